#!/bin/sh
# A plain and an aligned painter on two packs of real pictures; from the repository's root.
#     sh experiments/packs/run.sh PACKS        (PACKS holds emoji/ and chestxray/)
# The tokenizers come from experiments/tokenizers/run.sh. No encoder of real pictures is at hand
# offline: teacher and judge are the bundled encoders of drawn scenes (see LOG.md).
set -eu
packs=$1
export OMP_NUM_THREADS=1

study() {
    name=$1 steps=$2
    arra prepare "$packs/$name" --image-tokenizer runs/tokenizers/$name \
        --encoder clip=builtin:scenes-clip --size 64 --threads 1 --out runs/packs/$name-data
    arra study runs/packs/$name-data --out runs/packs/$name --judge builtin:scenes-judge \
        --set steps=$steps model.text_vocabulary=1024 log.every=20 \
        --prompts 128 --points 3 --point-prompts 32 --guidances 1 2 --guidance-prompts 16 \
        --threads 1
}
study emoji 700
study chestxray 500
python experiments/packs/collect.py runs/packs "$packs"
