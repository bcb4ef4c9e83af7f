"""Compares what `arra doctor --plan` predicts with what training takes; ends with a JSON line.

    python benchmarks/plan.py [--quick] [--only NAME] [--out experiments/plan/results.json]

Each case trains three optimizer steps (the loop's own step, on a model with values) in a process of
its own, and measures the peak in steps 2 and 3

    live     by PyTorch's CPU allocator: the profiler's memory events, every allocation and release
             since before the model was built, kernels' scratch too. Deterministic, and independent
             of the way the prediction counts.
    rss      by the system: the highest resident set minus what the process had before the model.
             Allocations from 128 KB on are given back at once (MALLOC_MMAP_THRESHOLD_), or the
             C library's hoard would be measured too. Needs Linux; judged from 256 MiB on, because
             libraries load some 10 MiB of their own when a model first trains.
    cuda     where there is a GPU: torch.cuda.max_memory_allocated.

The bar is 15 %. `--quick` leaves out the larger cases.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BAR = 0.15
RSS_FROM = 256 * 2**20
GRID, CODES = (8, 8), 512
STEPS = 3


@dataclass(frozen=True)
class Case:
    """A run to plan and to measure; `quick` ones are small."""

    name: str
    config: Any
    codes: int = CODES
    quick: bool = False
    base: bool = False  # --model names a small language model, saved for the occasion


def cases() -> list[Case]:
    """Configurations that differ in what takes the memory."""
    from arra.config import (
        AlignConfig,
        EngineConfig,
        LoraConfig,
        LossConfig,
        ModelConfig,
        OptimConfig,
    )
    from arra.recipes import RECIPES

    plain, bits = AlignConfig(weight=0.0), OptimConfig(bits=8)
    aligned = AlignConfig(weight=1.0, layer=(2,))
    model = ModelConfig(layers=6, hidden_size=384, heads=6, mlp_size=1024, max_length=256)
    deep = ModelConfig(layers=12, hidden_size=384, heads=6, mlp_size=1024, max_length=256)
    start = replace(
        RECIPES["scenes"]("", ""), dtype="float32", device="cpu", threads=1, batch_size=16
    )
    small = replace(model, layers=3, hidden_size=96, heads=3, mlp_size=256)

    def case(name: str, config: Any, **more: Any) -> Case:
        return Case(name, config, **more)

    checkpointed = EngineConfig(activation_checkpointing="full")
    lora = replace(start, model_path="", align=aligned, batch_size=8)
    eight_bit = [
        case("states-of-8-bits", replace(start, model=deep, micro_batch=1, optim=bits)),
        case("qlora", replace(lora, lora=LoraConfig(rank=8, quantize="4bit")), base=True),
    ]
    return [
        case("small-plain", replace(start, model=small, align=plain), quick=True),
        case(
            "small-checkpointed-accumulated-ema",
            replace(
                start,
                model=replace(small, layers=4, attention="eager"),
                engine=checkpointed,
                micro_batch=4,
                align=aligned,
                optim=OptimConfig(ema=0.999),
            ),
            quick=True,
        ),
        case("plain-sdpa", replace(start, model=model, align=plain)),
        case(
            "aligned-eager", replace(start, model=replace(model, attention="eager"), align=aligned)
        ),
        case("checkpointed", replace(start, model=deep, engine=checkpointed, align=aligned)),
        case(
            "accumulated-ema",
            replace(start, model=deep, align=aligned, micro_batch=2, optim=OptimConfig(ema=0.999)),
        ),
        case(
            "wide-vocabulary-z",
            replace(start, model=model, align=aligned, loss=LossConfig(z=1e-5, chunk=256)),
            codes=16384,
        ),
        case("bfloat16", replace(start, model=deep, align=aligned, dtype="bfloat16")),
        case("lora", replace(lora, lora=LoraConfig(rank=8)), base=True),
        *(eight_bit if find_spec("bitsandbytes") else []),
    ]


def predicted(case: Case) -> dict[str, Any]:
    """The plan's numbers for a case, and how long they took."""
    from arra.doctor.made_up import Material
    from arra.doctor.rehearsal import rehearse

    started = time.monotonic()
    config = case.config
    micro = config.micro_batch or config.batch_size
    material = Material(data_of(case), codebook_size=case.codes)
    found = rehearse(config, micro, config.batch_size // micro, material)
    return {
        **dataclasses.asdict(found.memory),
        "parameters": found.parts.total,
        "flops": found.flops,
        "seconds_of_planning": round(time.monotonic() - started, 2),
    }


def data_of(case: Case) -> Any:
    """One image with a caption, again and again."""
    from arra.doctor.made_up import captions, one_image

    return one_image(captions()[0], GRID, {"clip": 128} if case.config.align.weight else {})


def run_of(case: Case) -> Any:
    """The real run, with values, as `set_up` would make it."""
    import torch

    from arra.models.loading import load_for_training
    from arra.train.adapters import adapted_backbone
    from arra.train.setup import assemble
    from arra.train.world import World

    config, dataset = case.config, data_of(case)
    device = torch.device(config.device)

    def load() -> Any:
        return load_for_training(
            config.model_path,
            config.model,
            codebook_KC=torch.zeros(case.codes, 8),
            captions=dataset.texts,
            seed=0,
        )

    if config.lora.rank:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            backbone, adapter, _ = adapted_backbone(config, Path(folder), device, load)
            for parameter in backbone.model.parameters():
                if parameter.is_floating_point():
                    # What was read lies in a map of its file, of which no allocator knows.
                    parameter.data = parameter.data.clone()
    else:
        backbone, adapter = load(), None
    data = replace(config.data, prompt_dropout=0.0)
    return assemble(
        replace(config, data=data), Path("."), World(device), backbone, dataset, None, "", adapter
    )


def measured_live(case: Case) -> int:
    """Peak of the allocator's own account during steps 2 and 3, in bytes."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    from arra.train.step import optimizer_step
    from arra.train.tally import Tally

    torch.set_num_threads(1)
    gc.collect()  # what was released meanwhile would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run = run_of(case)
        gc.collect()
        for step in range(STEPS):
            with record_function(f"step {step}"):
                optimizer_step(run, step, Tally(run.world))
    events = seen.profiler.kineto_results.events()
    begin = min(e.start_ns() for e in events if e.name() == "step 1")
    end = max(e.end_ns() for e in events if e.name() == f"step {STEPS - 1}")
    live = peak = 0
    for event in events:
        if event.name() == "[memory]":
            live += event.nbytes()
            if begin <= event.start_ns() <= end:
                peak = max(peak, live)
    return peak


def measured_rss(case: Case) -> dict[str, Any]:
    """Peak resident set during steps 2 and 3 minus that before the model; seconds per step."""
    import torch

    from arra.train.step import optimizer_step
    from arra.train.tally import Tally

    torch.set_num_threads(1)
    run_of(dataclasses.replace(case, config=_tiny(case.config)))  # libraries load their parts
    if case.config.lora.rank:
        import_module("peft.tuners.lora.model")
    gc.collect()
    before = _status("VmRSS")
    run = run_of(case)
    optimizer_step(run, 0, Tally(run.world))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    started = time.monotonic()
    for step in range(1, STEPS):
        optimizer_step(run, step, Tally(run.world))
    seconds = (time.monotonic() - started) / (STEPS - 1)
    return {"rss": _status("VmHWM") - before, "seconds_per_step": round(seconds, 3)}


def measured_cuda(case: Case) -> dict[str, Any]:
    """The same on a GPU."""
    import torch

    from arra.train.step import optimizer_step
    from arra.train.tally import Tally

    run = run_of(dataclasses.replace(case, config=replace(case.config, device="cuda")))
    optimizer_step(run, 0, Tally(run.world))
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    for step in range(1, STEPS):
        optimizer_step(run, step, Tally(run.world))
    torch.cuda.synchronize()
    seconds = (time.monotonic() - started) / (STEPS - 1)
    peak = torch.cuda.max_memory_allocated()
    return {"cuda": peak, "cuda_seconds_per_step": round(seconds, 3)}


def _tiny(config: Any) -> Any:
    from arra.config import LoraConfig

    model = replace(config.model, layers=1, hidden_size=12, heads=1, mlp_size=8, max_length=256)
    align = replace(config.align, layer=(1,))
    return replace(config, model=model, align=align, model_path=None, lora=LoraConfig())


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def save_base(folder: Path) -> None:
    """A small language model that can only write, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from arra.doctor.made_up import captions
    from arra.models.loading import fit_text_tokenizer

    tokenizer = fit_text_tokenizer(captions(), 2048)
    tokenizer.save_pretrained(folder)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=256,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).save_pretrained(folder)


def in_process(name: str, base: str) -> dict[str, Any]:
    """All measures of one case in a fresh interpreter."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(128 * 1024),
        "MALLOC_ARENA_MAX": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--measure", base, "--only", name]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(case: Case, base: str) -> dict[str, Any]:
    """Resident set first: what the others leave behind would be in it."""
    import torch

    if case.base:
        case = replace(case, config=replace(case.config, model_path=base))
    found: dict[str, Any] = {"case": case.name, **measured_rss(case)}
    found["live"] = measured_live(case)
    if torch.cuda.is_available():
        found |= measured_cuda(case)
    found["predicted"] = predicted(case)
    peak = found["predicted"]["peak"]
    found["error"] = {
        kind: round(peak / found[kind] - 1, 4)
        for kind in ("live", "rss", "cuda")
        if kind in found and (kind != "rss" or peak >= RSS_FROM)
    }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--out", metavar="FILE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [c for c in cases() if options.only in (None, c.name)]
    chosen = [c for c in chosen if c.quick or not options.quick]
    if options.measure:
        print(json.dumps(measure(chosen[0], options.measure)))
        return 0
    rows = []
    with tempfile.TemporaryDirectory() as base:
        save_base(Path(base))
        for case in chosen:
            row = in_process(case.name, base)
            rows.append(row)
            measured = "  ".join(
                f"{kind} {row[kind] / 2**20:7.1f} ({100 * off:+.1f} %)"
                for kind, off in row["error"].items()
            )
            peak = row["predicted"]["peak"] / 2**20
            print(f"{case.name:36}predicted {peak:7.1f} MiB   {measured}", flush=True)
    errors = [(kind, abs(off)) for row in rows for kind, off in row["error"].items()]
    worst = {kind: max(off for k, off in errors if k == kind) for kind, _ in errors}
    result = {
        "bar": BAR,
        "worst_error": worst,
        "within_bar": all(value <= BAR for value in worst.values()),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "rows": rows,
    }
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}))
    return 0 if result["within_bar"] else 1


if __name__ == "__main__":
    sys.exit(main())
