"""What a measure is, for readers of a report, by its key."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """A measure in words.

    Attributes:
        text: a phrase.
        share: whether it is a part of 1.
    """

    text: str
    share: bool = False


MEANINGS = {
    "fd": Meaning("Fréchet distance of the features' Gaussians"),
    "sfid": Meaning("Fréchet distance of spatial features"),
    "fd_infinity": Meaning("Fréchet distance as it would be with ever more generated pictures"),
    "kid": Meaning("squared kernel distance of features, mean over random subsets"),
    "cmmd": Meaning("squared Gaussian kernel distance of features, times 1000"),
    "precision": Meaning("generated pictures that lie among real ones", share=True),
    "recall": Meaning("real pictures that lie among generated ones", share=True),
    "density": Meaning(
        "how densely real pictures lie around generated ones; about 1 for sets alike"
    ),
    "coverage": Meaning("real pictures with a generated one in their neighbourhood", share=True),
    "vendi": Meaning("effective number of different pictures, by features"),
    "is": Meaning("how clear the class of each picture is, and how many there are"),
    "ms_ssim_diversity": Meaning("structural similarity between generated pictures"),
    "ms_ssim_paired": Meaning("structural similarity of each picture to its real one"),
    "clip_score": Meaning("mean cosine of picture and prompt"),
    "scenes": Meaning("pictures that show everything that the prompt asks for", share=True),
    "scenes/shape": Meaning("the kinds of shape are those asked for", share=True),
    "scenes/colour": Meaning("every shape has the colour asked for", share=True),
    "scenes/size": Meaning("every shape has the size asked for", share=True),
    "scenes/count": Meaning("as many shapes as asked for, no more", share=True),
    "scenes/relation": Meaning("left of, right of, above, below, where both are there", share=True),
    "scenes/background": Meaning("the background asked for", share=True),
    "scenes/fragments": Meaning("pieces that belong to no shape, per picture"),
    "auroc_real": Meaning("area under a classifier's ROC curve on real pictures"),
    "auroc_generated": Meaning("area under a classifier's ROC curve on generated pictures"),
    "auroc_difference": Meaning("of a classifier's ROC areas, real minus generated"),
    "nearest_training": Meaning("distance to the nearest training picture"),
    "copies": Meaning("nearer to a training picture than 99 % of held-out real ones", share=True),
    "exact_copies": Meaning("training pictures to the pixel", share=True),
    "perplexity": Meaning("of the text, a token"),
    "bits_per_byte": Meaning("of the text"),
}


def meaning(key: str) -> Meaning:
    """Of `fd@dinov2`, `scenes/colour`, ...; without words where the measure is not known."""
    measure = key.split("@")[0]
    return MEANINGS.get(measure) or MEANINGS.get(measure.split("/")[0]) or Meaning("")
