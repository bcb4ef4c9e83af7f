"""From what a user names (a folder, a hub id, `builtin:NAME`) to a local folder."""

from pathlib import Path

from arra.files import read_json, sha256_of

BUNDLED = Path(__file__).parent / "bundled"
BUILTIN = {
    ("image tokenizer", "scenes"): "scenes-tokenizer",
    ("model", "scenes"): "scenes-model",
    ("encoder", "scenes-clip"): "scenes-clip",
    ("encoder", "scenes-judge"): "scenes-judge",
}


def resolve_folder(
    spec: str | Path, what: str, *, weights: bool = True, also: tuple[str, ...] = ()
) -> Path:
    """The folder that holds `spec`.

    Args:
        spec: a local folder, a Hugging Face hub id, or `builtin:NAME`.
        what: "model", "image tokenizer" or "encoder"; used to find bundled parts and in errors.
        weights: False = of a hub id only configs and tokenizers are fetched.
        also: further files to fetch of a hub id, where it has them.

    Raises:
        ValueError: an unknown builtin, a hub id that cannot be had, or a damaged bundled part.
    """
    name = str(spec)
    if name.startswith("builtin:"):
        return _bundled(name.removeprefix("builtin:"), what)
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file, but a {what} is a folder with a config.json")
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ValueError(f"{what} {name!r} is neither an existing folder nor a hub id OWNER/NAME")
    return _from_hub(name, what, weights, also)


def _from_hub(name: str, what: str, weights: bool, also: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", *(["*.safetensors"] if weights else []), *also]
    remedy = (
        f"Download it where there is a network and pass the folder that holds its config.json, "
        f"*.safetensors, preprocessor and tokenizer files instead of {name!r}"
    )
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (LocalEntryNotFoundError, ConnectionError, TimeoutError):
        raise ValueError(
            f"{what} {name!r} is not in the local cache and the hub cannot be reached. {remedy}."
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{what} {name!r} cannot be had ({reason}). {remedy}.") from None


def _bundled(name: str, what: str) -> Path:
    folder_name = BUILTIN.get((what, name))
    if folder_name is None:
        known = ", ".join(f"builtin:{n}" for kind, n in BUILTIN if kind == what)
        raise ValueError(f"no bundled {what} is called {name!r}; there is {known}")
    folder = BUNDLED / folder_name
    sums = read_json(BUNDLED / "SHA256SUMS.json")
    for relative, expected in sums.items():
        if relative.startswith(folder_name + "/"):
            file = BUNDLED / relative
            if not file.is_file() or sha256_of(file) != expected:
                raise ValueError(f"bundled file {relative} is missing or damaged: reinstall arra")
    return folder
