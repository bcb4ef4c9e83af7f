#!/bin/sh
# Pixel errors alone against a patch discriminator, at about equal time; from the repository's root.
#     sh experiments/tokenizers/fit_packs.sh PACKS      (PACKS holds emoji/ and chestxray/)
# One thread each. On a quiet core a step without the discriminator makes 178 images/s, one with it
# 97: so many fewer steps have the fits with it. Then curve.py measures every snapshot.
set -eu
packs=$1
out=runs/tokenizers/gan
export OMP_NUM_THREADS=1

fit() {
    name=$1 pack=$2
    shift 2
    arra tokenizer train "$packs/$pack" --size 64 --norm pixel --dtype bfloat16 --flip \
        --ema-decay 0.999 --log-every 100 --device cpu --out $out/$name "$@"
}
gan="--gan-weight 0.5 --gan-layers 2 --gan-channels 32 --gan-lr 4e-4 --gan-from 0.5"

fit emoji-pixels emoji --codebook-size 1024 --steps 7600 --snapshot-every 950
fit emoji-gan emoji --codebook-size 1024 --steps 5400 --snapshot-every 675 $gan
fit chestxray-pixels chestxray --codebook-size 512 --steps 4800 --snapshot-every 600
fit chestxray-gan chestxray --codebook-size 512 --steps 3400 --snapshot-every 425 $gan
# The bundled encoder of drawn scenes is not one of the domain: what such a feature loss does.
fit emoji-features emoji --codebook-size 1024 --steps 2700 --snapshot-every 675 \
    --feature-encoder builtin:scenes-clip --feature-weight 0.5
arra tokenizer train "$packs/emoji" --init $out/emoji-pixels --lr 5e-4 --steps 1400 --flip \
    --snapshot-every 350 --dtype bfloat16 --ema-decay 0.999 --log-every 100 --device cpu \
    --out $out/emoji-further $gan --gan-from 0

python experiments/tokenizers/curve.py $out "$packs"
