#!/bin/sh
# Fits and measures the three tokenizers of this folder; from the repository's root, one thread each.
#     sh experiments/semantic-tokenizer/run.sh
# The settings are those of the bundled scenes tokenizer (experiments/tokenizers/run.sh), 2,400 steps.
set -eu
out=runs/semantic-tokenizer
teacher=builtin:scenes-clip
export OMP_NUM_THREADS=1

fit() {
    name=$1
    shift
    arra tokenizer train builtin:scenes:1-4 --split everything --limit 24000 --size 64 --steps 2400 \
        --batch-size 16 --codebook-size 512 --norm pixel --encoder-kernel 1 --lr 2e-3 \
        --dtype bfloat16 --device cpu --log-every 100 --out $out/$name "$@"
}
fit plain
fit regularised --teacher $teacher --teacher-weight 0.5
fit semantic --kind semantic --teacher $teacher --teacher-weight 1.0

for name in plain regularised semantic; do
    for split in test compositional; do
        arra tokenizer evaluate $out/$name builtin:scenes:1-4 --split $split --limit 1000 --scenes \
            --encoder builtin:scenes-judge --probe $teacher --out $out/measured-$name-$split
    done
done
python experiments/semantic-tokenizer/collect.py $out
