#!/bin/sh
# Fits and measures the tokenizers of this folder; from the repository's root, one thread each.
#     sh experiments/tokenizers/run.sh PACKS        (PACKS holds emoji/ and chestxray/)
# Seconds depend on the machine: results.json says what was seen. The scenes tokenizer is bundled
# and frozen: its fit is here for the record and writes elsewhere. It sees every combination
# (--split everything), held-out ones too: a tokenizer must be able to show what a painter may paint.
set -eu
packs=$1
out=runs/tokenizers
export OMP_NUM_THREADS=1

arra tokenizer train builtin:scenes:1-4 --split everything --limit 24000 --size 64 --steps 3300 \
    --batch-size 16 \
    --codebook-size 512 --norm pixel --encoder-kernel 1 --lr 2e-3 --quantize-from 0.1 \
    --dtype bfloat16 --save-dtype float16 --log-every 100 --out $out/scenes
arra tokenizer train "$packs/emoji" --size 64 --steps 4000 --codebook-size 1024 --norm pixel \
    --dtype bfloat16 --log-every 100 --out $out/emoji
arra tokenizer train "$packs/chestxray" --size 64 --steps 2500 --codebook-size 512 --norm pixel \
    --dtype bfloat16 --log-every 100 --out $out/chestxray

for split in test compositional; do
    for shapes in 1-2 3-4; do
        arra tokenizer evaluate builtin:scenes builtin:scenes:$shapes --split $split --limit 1000 \
            --scenes --encoder builtin:scenes-judge --out $out/measured-scenes-$split-$shapes
    done
done
for pack in emoji chestxray; do
    arra tokenizer evaluate $out/$pack "$packs/$pack" --split test \
        --encoder builtin:scenes-judge --out $out/measured-$pack
done
python experiments/tokenizers/collect.py $out
