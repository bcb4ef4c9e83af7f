"""What `arra evaluate` can be asked, checked before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from arra.evaluate.inception import is_inception
from arra.evaluate.measures import (
    CLASSIFIED,
    DISTANCES,
    INCEPTION_ONLY,
    PAIRED_ROWS,
    SIMILARITIES,
)
from arra.evaluate.pathology import Unmentioned
from arra.evaluate.resizing import PUBLISHED, Filter
from arra.evaluate.xrv import is_xrv
from arra.generate.settings import DEFAULT_SLOTS, GenerateConfig

METRICS = (*DISTANCES, *SIMILARITIES, CLASSIFIED, "clip_score", "auroc", "copies", "scenes")


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, by which networks and against what; whoever is judged."""

    real: str | None = None
    """Reference images: a folder, tar, Parquet file, .npz batch, hub id or builtin:scenes. An .npz
    may have moments (mu, sigma, mu_s, sigma_s, as ADM's): fd and sfid then compare with these."""
    metrics: str = "fd,kid"
    """Comma-separated. fd, kid, cmmd, prdc (precision, recall, density, coverage), fd_infinity:
    distances of --extractor's features to those of --real; vendi: diversity in those features;
    with --extractor inception fd is FID, sfid is sFID and is the Inception Score;
    ms_ssim_diversity (among the generated), ms_ssim_paired (each to its real image); clip_score
    (each to its prompt, in the eyes of --clip); auroc (how well --extractor xrv:FILE tells
    pathologies in generated images, and in real ones); copies (how many are closer to a picture of
    --training than real images that were not trained on); scenes (reads the pixels of drawn scenes
    back and compares them with the prompts)."""
    extractor: tuple[str, ...] = ()
    """Networks whose features are compared: inception (FID's; or inception:FILE of its weights),
    xrv:FILE (torchxrayvision's DenseNet of X-rays), or an encoder: folder, hub id or builtin:NAME;
    E@class|projected|mean|both."""
    resize: Filter = PUBLISHED
    """How images come to inception's 299 pixels: as in the evaluators of TTUR, ADM and LlamaGen
    (TensorFlow 1's bilinear), in clean-fid, or in pytorch-fid."""
    clip: tuple[str, ...] = ()
    """CLIPs of clip_score, with text tower and tokenizer: CLIP, SigLIP or open_clip's format (such
    as BioMedCLIP); folder, hub id or builtin:scenes-clip."""
    labels: str | None = None
    """Of auroc: the column that names all that an image shows; default: a column per pathology, or
    labels, label, finding, findings or finding_labels."""
    training: str | None = None
    """Of copies: all that the painter was trained on, in any form of --real, which is then held
    out; default: --real itself."""
    training_split: str | None = None
    """Split of --training, where it has several."""
    unmentioned: Unmentioned = "unknown"
    """Of auroc: what an empty cell of a pathology's own column means."""
    split: str | None = None
    """Split of --real, where it has several."""
    limit: int | None = None
    """Use only the first images of each set; default: all."""
    size: int | None = None
    """Pixels per side that both sets are cropped to; default: the generated images' own."""
    text_column: str = "text"
    """Column that holds the captions, where a set has such."""
    image_column: str = "image"
    """Column that holds the images."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """UTF-8 file of what --model paints: one prompt per line, or JSON lines (*.jsonl)."""
    num: int = 1
    """Images that --model paints per prompt."""
    seed: int = 0
    """Image j of every prompt uses seed + j, where the prompt occurs again the seeds behind; also
    of all that is drawn at random in a measure."""
    by_seed: bool = False
    """Also measure the pictures of each seed apart (2 to 16 of them, equally many pictures each);
    the distances take that much longer."""
    slots: int = DEFAULT_SLOTS
    """Rows per forward pass of --model."""
    batch_size: int = 64
    """Images per call of an extractor."""
    workers: int = 2
    """Threads that decode images."""
    paired_images: int = PAIRED_ROWS
    """Images of each set that cmmd, prdc and vendi compare each with each: those with the smallest
    hashes. ADM's evaluator compares all of 50,000."""
    kid_subsets: int = 100
    """Random subsets that kid averages over."""
    kid_subset_size: int = 1000
    """Images in each of them; sets must have that many."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu."""

    @property
    def metric_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.metrics.split(",") if name.strip())


@dataclass(frozen=True)
class EvaluateConfig(MeasureConfig):
    """Measure painted images against real ones or their prompts, or a language model on text.

    Also: arra evaluate arrange | compare | scored | sweep --help.
    """

    generated: str | None = None
    """Images to judge, as --real; a folder that `arra generate` wrote brings its prompts along."""
    model: str | None = None
    """In the place of --generated: a painter whose pictures are judged without files in between,
    painted from --prompts or else from the captions of --real. With --text: the language model."""
    cfg: float | None = None
    """Guidance scale of --model's pictures; default: the model's own."""
    save_moments: Path | None = None
    """Keep the moments of --real's features in this .npz file, for --real of another run; ADM's
    evaluator reads it too."""
    text: Path | None = None
    """UTF-8 file of documents, one a line or parted by blank lines: perplexity of --model on it."""
    out: Path | None = None
    """Where the report goes: a file *.json, or a folder with the report as JSON, Markdown and HTML
    page, the scores of each picture, and sample grids."""

    @property
    def judges_images(self) -> bool:
        return self.generated is not None or (self.model is not None and self.text is None)

    def __post_init__(self) -> None:
        """Raises ValueError for a request that cannot be answered, before anything is loaded."""
        for name in self.metric_names:
            if name not in METRICS:
                raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        for name in ("limit", "size", "batch_size", "kid_subsets", "workers", "num"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("kid_subset_size", "paired_images"):
            if getattr(self, name) < 2:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 2")
        if self.generated is None and self.text is None and self.model is None:
            raise ValueError(
                "nothing to evaluate: give --generated or --model (with --real), or --text FILE"
            )
        if self.text is not None and self.model is None:
            raise ValueError("--text needs --model: the language model whose text is judged")
        if self.generated is not None and self.model is not None and self.text is None:
            raise ValueError("--generated and --model are both what is judged: give one of them")
        # Whatever cannot be painted with is told now.
        GenerateConfig("", "", num=self.num, seed=self.seed, cfg=self.cfg, slots=self.slots)
        self._check_unread()
        if not self.judges_images:
            return
        if not self.metric_names:
            raise ValueError(
                f"--metrics names nothing to measure: choose from {', '.join(METRICS)}"
            )
        if ("clip_score" in self.metric_names) != bool(self.clip):
            raise ValueError("--metrics clip_score and --clip SPEC need each other: give both")
        compares = [name for name in self.metric_names if name in (*DISTANCES, "ms_ssim_paired")]
        if compares and self.real is None:
            raise ValueError(f"--metrics {','.join(compares)} compares with --real: give it")
        self._check_inception()
        if self.training is not None and "copies" not in self.metric_names:
            raise ValueError("--training is what --metrics copies looks for: give both")
        if "copies" in self.metric_names and self.training is None and self.real is None:
            raise ValueError("--metrics copies needs --training: what the painter was trained on")
        if "auroc" in self.metric_names and (
            self.real is None or not any(map(is_xrv, self.extractor))
        ):
            raise ValueError("--metrics auroc needs --real, with labels, and --extractor xrv:FILE")
        if self.save_moments is not None and (self.real is None or len(self.extractor) != 1):
            raise ValueError("--save-moments is of --real under one --extractor: give one of each")
        if self.save_moments is not None and self.save_moments.suffix != ".npz":
            raise ValueError(f"--save-moments {self.save_moments}: its name must end in .npz")
        sees = [name for name in self.metric_names if name in (*DISTANCES, "vendi", "copies")]
        if sees and not self.extractor:
            raise ValueError(
                f"--metrics {','.join(sees)} needs --extractor: a folder, a hub id or "
                f"builtin:scenes-judge (the measure is named after it)"
            )

    def _check_unread(self) -> None:
        """Refuses options that would change nothing: whoever gives one believes that it does."""
        if self.generated is not None and (self.cfg, self.prompts, self.num) != (None, None, 1):
            raise ValueError(
                "--cfg, --prompts and --num are of pictures that --model paints; those of "
                "--generated are there already"
            )
        of_images = (self.real, self.prompts, self.cfg, self.training, self.save_moments)
        given = any(each is not None for each in of_images) or self.extractor or self.clip
        if not self.judges_images and (given or self.by_seed):
            raise ValueError(
                "--text judges what --model writes and no pictures: measure those without --text"
            )
        auroc = "auroc" in self.metric_names
        for flag, is_given, of, is_asked in (
            ("--labels", self.labels is not None, "--metrics auroc", auroc),
            ("--unmentioned", self.unmentioned != "unknown", "--metrics auroc", auroc),
            ("--split", self.split is not None, "--real", self.real is not None),
            ("--training-split", bool(self.training_split), "--training", bool(self.training)),
        ):
            if is_given and not is_asked:
                raise ValueError(f"{flag} is of {of} alone: give both or neither")

    def _check_inception(self) -> None:
        if any(map(is_inception, self.extractor)):
            return
        alone = [name for name in self.metric_names if name in INCEPTION_ONLY]
        if alone:
            raise ValueError(
                f"--metrics {','.join(alone)} is of streams that only FID's network has: give "
                f"--extractor inception"
            )
        if self.resize != PUBLISHED:
            raise ValueError(
                f"--resize {self.resize} is of --extractor inception alone: encoders resize by "
                f"their own preprocessing"
            )
