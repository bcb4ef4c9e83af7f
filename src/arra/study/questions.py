"""What both arms are asked, by whom it is answered, and what it is held against.

Legend: N images, D feature width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from arra.data.framing import framing_of
from arra.data.images import load_rgb
from arra.data.manifest import Manifest, read_manifest
from arra.data.selection import reading_of
from arra.data.sources import Reject
from arra.encoders import load_encoder
from arra.evaluate.entries import open_entries
from arra.evaluate.features import image_features
from arra.evaluate.image_set import StoredSet
from arra.files import read_json, write_json
from arra.models.run_folder import step_name
from arra.study.arms import Arm, StudyConfig, checkpoint_steps
from arra.study.measuring import Judge, examine, score
from arra.study.processes import Job, python, run_jobs
from arra.study.prompts import TRAIN, Prompts, prompts_of
from arra.study.worker import Losses, Painting, WorkerJob

VALIDATION = "val"
UNSEEN = "unseen"  # the group of captions that no training image has
REAL_IMAGES = 2048  # at most so many real images are on the other side of a distance
READ_AT_ONCE = 256


@dataclass(frozen=True)
class Asked:
    """The questions of a study: the same for every arm, so that answers are paired."""

    config: StudyConfig
    data: Path
    manifest: Manifest
    arms: list[Arm]
    prompts: dict[str, Prompts]  # by reported group; prompt i is painted from seed i
    for_guidance: list[str]
    known: frozenset[str]  # captions of the training split

    @staticmethod
    def of(config: StudyConfig, data: Path, arms: list[Arm]) -> "Asked":
        """Picks the captions. ValueError where the dataset has too few, or no way to judge."""
        manifest = read_manifest(data)
        if config.judge is None and not of_scenes(manifest) and len(config.guidances) > 1:
            raise ValueError(
                "choosing a guidance needs something to judge pictures by: give --judge ENCODER, "
                "or a single value with --guidances"
            )
        counts = {config.split: config.prompts}
        counts |= {split: max(2, config.prompts // 2) for split in config.more_splits}
        known = frozenset(prompts_of(data, TRAIN).texts)
        captions = {name: prompts_of(data, name) for name in {*counts, VALIDATION}}
        reserved = config.guidance_prompts if len(config.guidances) > 1 else 0
        for_guidance = captions[VALIDATION].part(-reserved, None).texts if reserved else []
        if VALIDATION in counts and reserved:  # what chooses the guidance is not reported
            captions[VALIDATION] = captions[VALIDATION].part(None, -reserved)
        prompts = {name: captions[name].part(0, count) for name, count in counts.items()}
        if config.unseen:
            unseen = captions[config.split].without(known).once_each()
            prompts[UNSEEN] = unseen.part(0, config.unseen)
        for name, chosen in (
            *((name, each.texts) for name, each in prompts.items()),
            ("for the guidance", for_guidance or ["", ""]),
        ):
            if len(chosen) < 2:
                raise ValueError(
                    f"{data} has too few captions ({name}): at least 2 are needed besides "
                    f"--guidance-prompts {config.guidance_prompts}"
                )
        return Asked(config, data, manifest, arms, prompts, for_guidance, known)

    # ---- guidance -------------------------------------------------------------------------------

    @property
    def guidance_file(self) -> Path:
        return Path(self.config.out) / "guidance.json"

    @property
    def chosen(self) -> bool:
        return self.guidance_file.exists()

    def guidance(self, arm: str) -> float:
        """The scale that was chosen for `arm` on the first seed's pair."""
        return float(read_json(self.guidance_file)[arm]["chosen"])

    def choose_guidance(self, say: Callable[[str], None]) -> None:
        """Each arm's best scale on validation captions, written to guidance.json."""
        scales = self.config.guidances
        if len(scales) == 1:
            both = {"chosen": scales[0], "scores": {}}
            write_json(self.guidance_file, {"plain": both, "aligned": both})
            return
        first = [arm for arm in self.arms if arm.seed == self.config.seeds[0]]
        jobs = {}
        for arm in first:
            last = step_name(arm.config.steps)
            paintings = [
                Painting(last, self.for_guidance, cfg, str(_guidance_folder(arm, cfg)))
                for cfg in scales
            ]
            jobs[arm.label] = self._job(arm, paintings, [])
        self._run("guidance", first, jobs, say)
        judge = self.judge(VALIDATION)
        found = {}
        for arm in first:
            scores = {
                cfg: score(judge, examine(judge, *painted(_guidance_folder(arm, cfg))))
                for cfg in scales
            }
            best = max(scores, key=lambda cfg: scores[cfg])
            found[arm.name] = {"chosen": best, "scores": {f"{k:g}": v for k, v in scores.items()}}
            say(f"   {arm.name}: guidance {best:g} of {', '.join(f'{s:g}' for s in scales)}")
        write_json(self.guidance_file, found)

    # ---- painting -------------------------------------------------------------------------------

    @property
    def answered(self) -> bool:
        return self.chosen and not any(self._final_job(arm).pending() for arm in self.arms)

    def paint(self, say: Callable[[str], None]) -> None:
        """All pictures and losses that the report needs."""
        jobs = {arm.label: self._final_job(arm) for arm in self.arms}
        self._run("paint", self.arms, jobs, say)

    def point_prompts(self) -> list[str]:
        return self.prompts[self.config.split].texts[: self.config.point_prompts]

    def _final_job(self, arm: Arm) -> WorkerJob:
        cfg, steps = self.guidance(arm.name), checkpoint_steps(self.config, arm.config)
        last = step_name(steps[-1])
        paintings = [
            Painting(last, chosen.texts, cfg, str(arm.painted / group))
            for group, chosen in self.prompts.items()
        ]
        paintings += [
            Painting(step_name(s), self.point_prompts(), cfg, str(arm.painted / step_name(s)))
            for s in steps[:-1]
        ]
        out = str(arm.painted / "losses.json")
        limit = self.config.validation_images
        return self._job(arm, paintings, [Losses(last, str(self.data), VALIDATION, limit, out)])

    def _job(self, arm: Arm, paintings: list[Painting], losses: list[Losses]) -> WorkerJob:
        return WorkerJob(
            run=str(arm.run),
            slots=self.config.slots,
            device=self.config.device_name,
            paintings=paintings,
            losses=losses,
        )

    def _run(
        self,
        name: str,
        arms: Sequence[Arm],
        asked: dict[str, WorkerJob],
        say: Callable[[str], None],
    ) -> None:
        jobs = []
        for arm in arms:
            job = asked[arm.label]
            if not job.pending():
                continue
            file = arm.painted / f"{name}.job.json"
            job.write(file)
            total = len(job.paintings) + len(job.losses)

            def progress(job: WorkerJob = job, total: int = total) -> str:
                return f"{total - job.pending()} of {total} answers"

            argv = python("arra.study.worker", str(file))
            jobs.append(Job(arm.label, argv, arm.painted / f"{name}.log", progress))
        threads, parallel = self.config.threads_each, self.config.parallel
        run_jobs(jobs, parallel=parallel, threads=threads, say=say)

    # ---- the judge ------------------------------------------------------------------------------

    def split_of(self, group: str) -> str:
        """The dataset's split that a group's captions are of."""
        return self.config.split if group == UNSEEN else group

    def share_known(self, group: str) -> float:
        """How many of a group's captions training images have too, from 0 to 1."""
        texts = self.prompts[group].texts
        return sum(text in self.known for text in texts) / len(texts)

    def judge(self, group: str) -> Judge:
        """What pictures are held against: the scene reader, and real images of the group."""
        scenes = of_scenes(self.manifest)
        if self.config.judge is None:
            return Judge(scenes, None, np.zeros((0, 0)), self.config.distances)
        encoder = load_encoder(self.config.judge, device=self.config.device_name)
        split = self.split_of(group)
        real = prompts_of(self.data, split)
        if group == UNSEEN:
            real = real.without(self.known)
        images = real_images(self.data, self.manifest, split, real.ids)
        return Judge(scenes, encoder, image_features(images, encoder), self.config.distances)


def of_scenes(manifest: Manifest) -> bool:
    """Whether captions of the dataset can be read back from pixels."""
    return str(manifest.source.get("name", "")).startswith("builtin:scenes")


def real_images(
    data: Path, manifest: Manifest, split: str, ids: Sequence[str]
) -> list[Image.Image]:
    """The source's own images of some rows of a split, framed as they were prepared, at most
    REAL_IMAGES.

    A split that `prepare` took from train is found again by its ids.
    """
    wanted, framing = set(ids[:REAL_IMAGES]), framing_of(manifest.size, manifest.framing)
    described, reading = manifest.source, reading_of(manifest.source)
    name = described["name"]
    source = reading.open(name, None)
    if split in source.splits:
        source = reading.open(name, split)
        if source.fingerprint != described["fingerprints"][split]:
            raise ValueError(
                f"{name} is no longer what {data} was prepared from, so its images cannot be "
                f"compared with: prepare the data again"
            )
    found: dict[str, Image.Image] = {}
    for start in range(0, len(source), READ_AT_ONCE):
        for record in source.read(start, min(start + READ_AT_ONCE, len(source))):
            if not isinstance(record, Reject) and record.id in wanted:
                found[record.id] = framing.frame(load_rgb(record.image))
        if len(found) == len(wanted):
            break
    missing = len(wanted) - len(found)
    if missing:
        raise ValueError(
            f"{missing} of {len(wanted)} images of {split} are no longer in {name}, "
            f"from which {data} was prepared: put them back, or prepare the data again"
        )
    return list(found.values())


def painted(folder: Path) -> tuple[list[Image.Image], list[str]]:
    """Images and prompts of a folder that the worker wrote."""
    found = StoredSet(str(folder), open_entries(str(folder)))
    assert found.captions is not None, f"{folder} was written with its prompts"
    return [picture.image for picture in found], list(found.captions)


def _guidance_folder(arm: Arm, cfg: float) -> Path:
    return arm.painted / f"guidance-{cfg:g}"
