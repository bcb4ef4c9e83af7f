"""`arra VERB`: parsing only. Whatever is heavy is imported inside the verb."""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arra.config import TrainConfig

USAGE = """usage: arra VERB [...]      (arra VERB --help for its options)

  demo        train a plain and an aligned painter on drawn scenes, paint, measure, write a report
  prepare     images and captions -> a dataset of codes and features
  tokenizer   train | evaluate an image tokenizer
  train       train a painter, aligned or plain; the same command again resumes
  generate    paint prompts
  evaluate    measure what was painted
  study       a pair of arms, plain and aligned, on a prepared dataset, with intervals
  export      a run -> an ordinary checkpoint of its own architecture
  convert     a published checkpoint file -> our folder, and back into its own layout
  bench       prepare, train, generate, evaluate: how fast, part by part, how far from the limit
  doctor      is a dataset whole; what became of a run; does a model open; what would a run need

  --version   print the version
  --debug     (anywhere) full tracebacks
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit code 0 = done, 2 = wrong use, 1 = failed, 130 = Ctrl-C; of `train` also
    75 = SIGTERM, its state saved (raised as SystemExit)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if arguments else 2
    if arguments[0] == "--version":
        import arra

        print(arra.__version__)
        return 0
    # Where torchao is installed, transformers imports it, and it warns of GPU parts on any CPU.
    for noisy in ("torchao", "torch.utils._pytree"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    verb = VERBS.get(arguments[0])
    if verb is None:
        return _complain(f"there is no verb {arguments[0]!r}\n\n{USAGE}", 2)
    try:
        verb(arguments[1:])
    except WrongUse as error:
        if debug:
            raise
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        goes_on = arguments[0] in GOING_ON or " ".join(arguments[:2]) in GOING_ON
        rest = "; the same command goes on where it was" if goes_on else ""
        return _complain(f"stopped{rest}", 130)
    except (ValueError, OSError, FloatingPointError) as error:
        if debug:
            raise
        return 1 if _is_said(error) else _complain(_sentence(error), 1)
    return 0


class WrongUse(ValueError):
    """The command line itself is wrong."""


def _complain(message: str, code: int) -> int:
    rank = os.environ.get("RANK", "0")  # of torchrun: a mistake may be one process's own
    print(f"arra{f' (rank {rank})' if rank != '0' else ''}: {message}", file=sys.stderr)
    return code


def _is_said(error: Exception) -> bool:
    """Whether another of several processes complains of the same."""
    notes = getattr(error, "__notes__", ())
    if not notes:
        return False
    from arra.train.world import SAID

    return SAID in notes


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = f" ({error.filename})" if error.filename else ""
        return (
            f"the disk is full{where}: free some space and run the same command again; what was "
            f"finished is kept"
        )
    return " ".join(str(error).split()) or type(error).__name__


def _parse(kind: Any, arguments: Sequence[str], prog: str, default: Any = None) -> Any:
    import tyro

    options = {} if default is None else {"default": default}
    # Several processes on one machine have the same arguments.
    options["console_outputs"] = os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return tyro.cli(kind, args=list(arguments), prog=prog, **options)
    except ValueError as error:
        raise WrongUse(_sentence(error)) from None


# ---- verbs ---------------------------------------------------------------------------------------


def _demo(arguments: Sequence[str]) -> None:
    from arra.study.demo import DemoConfig, run_demo

    print(run_demo(_parse(DemoConfig, arguments, "arra demo")))


def _prepare(arguments: Sequence[str]) -> None:
    from arra.data.prepare import prepare
    from arra.data.prepare_config import PrepareConfig

    print(prepare(_parse(PrepareConfig, arguments, "arra prepare")))


def _tokenizer(arguments: Sequence[str]) -> None:
    action = arguments[0] if arguments else "--help"
    if action == "train":
        import tyro

        from arra.image_tokenizers.fit import TokenizerConfig, fit_tokenizer
        from arra.image_tokenizers.fit_recipes import starting_from

        try:
            start = starting_from(arguments[1:])
        except ValueError as error:
            raise WrongUse(_sentence(error)) from None
        default = dataclasses.replace(start, source=tyro.MISSING, out=tyro.MISSING)
        config = _parse(TokenizerConfig, arguments[1:], "arra tokenizer train", default)
        print(fit_tokenizer(config))
    elif action == "evaluate":
        from arra.image_tokenizers.measure import MeasureConfig, measure_tokenizer

        measure_tokenizer(_parse(MeasureConfig, arguments[1:], "arra tokenizer evaluate"))
    elif action in ("-h", "--help"):
        print("usage: arra tokenizer train|evaluate [...]      (add --help for their options)")
    else:
        raise WrongUse(f"arra tokenizer {action}: there is train and evaluate")


def _train(arguments: Sequence[str]) -> None:
    from arra.config import TrainConfig
    from arra.recipes import RECIPES, START_FROM_A_MODEL

    recipe = arguments[0] if arguments else "--help"
    if recipe in ("-h", "--help"):
        print("usage: arra train RECIPE --data DIR --out RUN [...]\n")
        for name, function in RECIPES.items():
            print(f"  {name:17}{(function.__doc__ or '').splitlines()[0]}")
        print("\n  RUN/config.json in the place of RECIPE repeats a run, with any option changed")
        print("\narra train RECIPE --help lists every option with the recipe's default")
        return
    import tyro

    default = dataclasses.replace(_recipe(recipe), out=tyro.MISSING)
    if recipe in RECIPES:
        default = dataclasses.replace(default, data_folder=tyro.MISSING)
    config = _parse(TrainConfig, arguments[1:], f"arra train {recipe}", default)
    if config.recipe in START_FROM_A_MODEL and config.model_path is None:
        raise WrongUse(
            f"arra train {config.recipe} starts from a model that you have: name it with --model, "
            f"or start from nothing with base or scenes"
        )
    from arra.train.loop import train

    folder = train(config)
    if os.environ.get("RANK", "0") == "0":
        print(folder)


def _recipe(name: str) -> "TrainConfig":
    """The config of a recipe, or of a run whose config.json is named."""
    from arra.config import TrainConfig
    from arra.config_json import from_json
    from arra.files import read_json
    from arra.recipes import RECIPES

    if name in RECIPES:
        return RECIPES[name]("", "")
    if not name.endswith(".json"):
        raise WrongUse(f"there is no recipe {name!r}; there is {', '.join(RECIPES)}")
    return from_json(TrainConfig, {k: v for k, v in read_json(name).items() if k != "run"})


def _generate(arguments: Sequence[str]) -> None:
    from arra.generate.settings import GenerateConfig

    config = _parse(GenerateConfig, arguments, "arra generate")
    from arra.generate.pictures import generate

    print(generate(config))


def _evaluate(arguments: Sequence[str]) -> None:
    if arguments and not arguments[0].startswith("-"):
        from arra.evaluate.actions import ACTIONS

        name = arguments[0]
        if name not in ACTIONS:
            raise WrongUse(f"arra evaluate {name}: there is {', '.join(ACTIONS)}, or options alone")
        config = _parse(ACTIONS[name].config, arguments[1:], f"arra evaluate {name}")
        print(ACTIONS[name].run(config))
        return
    from arra.evaluate.protocol import evaluate
    from arra.evaluate.report import told
    from arra.evaluate.settings import EvaluateConfig

    print(told(evaluate(_parse(EvaluateConfig, arguments, "arra evaluate"))))


def _study(arguments: Sequence[str]) -> None:
    from arra.study.arms import StudyConfig, run_study

    print(run_study(_parse(StudyConfig, arguments, "arra study")))


def _export(arguments: Sequence[str]) -> None:
    from arra.export import ExportConfig, export

    print(export(_parse(ExportConfig, arguments, "arra export")))


def _convert(arguments: Sequence[str]) -> None:
    from arra.convert import ConvertConfig, convert

    print(convert(_parse(ConvertConfig, arguments, "arra convert")))


def _bench(arguments: Sequence[str]) -> None:
    action = arguments[0] if arguments else "--help"
    if action in ("-h", "--help"):
        print(
            "usage: arra bench prepare|train|generate|loader|evaluate [...]  (--help: its options)"
        )
        return
    if action == "train":
        from arra.bench import train

        config = _parse(train.BenchTrainConfig, arguments[1:], "arra bench train")
        print(train.told(train.bench_train(config)))
        return
    if action == "generate":
        from arra.bench import generate

        chosen = _parse(generate.BenchGenerateConfig, arguments[1:], "arra bench generate")
        print(generate.told(generate.bench_generate(chosen)))
        return
    if action == "loader":
        from arra.bench import loader

        asked = _parse(loader.BenchLoaderConfig, arguments[1:], "arra bench loader")
        print(loader.told(loader.bench_loader(asked)))
        return
    if action == "evaluate":
        from arra.bench import evaluate

        wanted = _parse(evaluate.BenchEvaluateConfig, arguments[1:], "arra bench evaluate")
        print(evaluate.told(evaluate.bench_evaluate(wanted)))
        return
    if action != "prepare":
        raise WrongUse(
            f"arra bench {action}: there are prepare, train, generate, loader and evaluate"
        )
    from arra.bench.prepare import BenchPrepareConfig, bench_prepare, told

    print(told(bench_prepare(_parse(BenchPrepareConfig, arguments[1:], "arra bench prepare"))))


def _doctor(arguments: Sequence[str]) -> None:
    planned = any(a.split("=")[0] == "--plan" for a in arguments)
    if planned:
        _plan_a_run(arguments)
    elif not arguments:
        raise WrongUse(
            "arra doctor DATASET says whether a prepared dataset is whole and sound, arra doctor "
            "RUN what became of a training run, arra doctor MODEL whether a model opens and "
            "paints, arra doctor --plan RECIPE what a run would need"
        )
    elif arguments[0] in ("-h", "--help"):
        print("usage: arra doctor DATASET [...]           is a prepared dataset whole and sound?")
        print("       arra doctor RUN [...]               what became of a training run?")
        print(
            "       arra doctor MODEL [...]             does a model open, and how does it paint?"
        )
        print("       arra doctor --plan RECIPE [...]     what would a run need?\n")
        for part in (_audit, _examine, _look_at):
            with contextlib.suppress(SystemExit):
                part(["--help"])
        _plan_a_run(["--help"])
    else:
        _named(arguments)(arguments)


def _named(arguments: Sequence[str]) -> Callable[[Sequence[str]], None]:
    """Who looks at the first dataset, run or model that is named."""
    from arra.doctor.audit import is_dataset
    from arra.doctor.model import is_model
    from arra.doctor.run import is_run
    from arra.files import place

    for each in arguments:
        if not each.startswith("-") and "://" not in each:
            if is_dataset(place(each)):
                return _audit
            if is_run(place(each)):
                return _examine
            if is_model(each):
                return _look_at
    return _audit


def _look_at(arguments: Sequence[str]) -> None:
    from arra.doctor.settings import ModelCheckConfig

    config = _parse(ModelCheckConfig, arguments, "arra doctor")
    from arra.doctor.audit_report import told
    from arra.doctor.model import look_at

    found = look_at(config)
    print(json.dumps(found.to_json(), indent=1) if config.json else told(found))
    if found.failed:
        raise ValueError(f"{config.model}: {found.verdict.removeprefix('verdict: ')}")


def _examine(arguments: Sequence[str]) -> None:
    from arra.doctor.settings import RunConfig

    config = _parse(RunConfig, arguments, "arra doctor")
    from arra.doctor.audit_report import told
    from arra.doctor.run import examine
    from arra.files import place

    found, seen = examine(config)
    if config.out is not None:
        from arra.doctor.run_page import write_report

        write_report(place(config.out), found, seen)
    as_json = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
    print(as_json if config.json else told(found))
    if found.failed:
        raise ValueError(f"{config.run}: {found.verdict.removeprefix('verdict: ')}")


def _compare(one: str, other: str, as_json: bool) -> None:
    from arra.data.compare import compare_datasets

    found = compare_datasets(one, other)
    print(json.dumps(found.to_json(), indent=1) if as_json else found.told())
    if not found.agrees:
        raise ValueError(f"{one} and {other} do not agree")


def _audit(arguments: Sequence[str]) -> None:
    from arra.doctor.settings import AuditConfig

    config = _parse(AuditConfig, arguments, "arra doctor")
    if config.against is not None:
        _compare(config.dataset, config.against, config.json)
        return
    from arra.doctor.audit import audit, is_dataset
    from arra.files import place

    if not is_dataset(place(config.dataset)):
        raise WrongUse(
            f"{config.dataset} is no prepared dataset (it has neither manifest.json nor "
            f"plan.json), no training run (it has no config.json of one) and no model (none that "
            f"names a model_type); arra doctor --plan RECIPE plans a run"
        )
    found, seen = audit(config)
    if config.out is not None:
        from arra.doctor.audit_page import write_report

        write_report(place(config.out), found, seen)
    if config.json:
        print(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
    else:
        from arra.doctor.audit_report import told

        print(told(found))
    if found.failed:
        raise ValueError(f"{config.dataset}: {found.verdict.removeprefix('verdict: ')}")


def _plan_a_run(arguments: Sequence[str]) -> None:
    import tyro

    from arra.config import TrainConfig
    from arra.doctor.settings import PlanConfig

    try:
        options, rest = tyro.cli(
            PlanConfig, args=list(arguments), prog="arra doctor", return_unknown_args=True
        )
    except ValueError as error:
        raise WrongUse(_sentence(error)) from None
    config = _parse(TrainConfig, rest, f"arra doctor --plan {options.plan}", _recipe(options.plan))
    from arra.doctor.plan import make_plan
    from arra.doctor.report import told

    plan = make_plan(options, config)
    print(json.dumps(plan.to_json(), indent=1) if options.json else told(plan))


VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "demo": _demo,
    "prepare": _prepare,
    "tokenizer": _tokenizer,
    "train": _train,
    "generate": _generate,
    "evaluate": _evaluate,
    "study": _study,
    "export": _export,
    "convert": _convert,
    "bench": _bench,
    "doctor": _doctor,
}
GOING_ON = ("demo", "prepare", "train", "generate", "study", "tokenizer train", "evaluate sweep")
"""What keeps finished parts when it is stopped, and does not do them again."""


if __name__ == "__main__":
    # A wheel on a machine without a hub must not wait for one, and forks must not warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
