"""How long a decode step takes: GPT-B's shape in bfloat16, all that a step does but the drawing.

    OMP_NUM_THREADS=2 python experiments/weights/step.py 2,4,8,32

Prints per number of rows {weights: median ms, least ms}, the arms in turns.
"""

import copy
import sys
import time
from statistics import median

import torch

from arra.bench.generate_arms import fresh_painter
from arra.models.quantized import quantize_weights

CLASS, COLUMNS, PLACE, ROUNDS, STEPS, WARM = 16385, 272, 200, 3, 8, 2


@torch.inference_mode()
def main() -> None:
    full = fresh_painter("B", torch.device("cpu"), torch.bfloat16)
    arms = {"bf16": full}
    for kind in ("int8", "int4"):
        arms[kind] = copy.deepcopy(full)
        quantize_weights(arms[kind], kind)
    for rows in map(int, sys.argv[1].split(",")):
        caches = {}
        for name, arm in arms.items():
            caches[name] = arm.new_cache(rows, COLUMNS)
            arm.prefill(torch.full((rows, 1), CLASS), caches[name], torch.arange(rows))
        ids_R1, place_R1 = torch.zeros(rows, 1, dtype=torch.long), torch.full((rows, 1), PLACE)
        took: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(ROUNDS):
            for name, arm in arms.items():
                with arm.decoding():
                    for step in range(STEPS):
                        start = time.perf_counter()
                        arm.head(arm.step(ids_R1, place_R1, caches[name])[:, 0])
                        if step >= WARM:
                            took[name].append(1e3 * (time.perf_counter() - start))
        print(rows, {n: (round(median(ms), 2), round(min(ms), 2)) for n, ms in took.items()})


if __name__ == "__main__":
    main()
