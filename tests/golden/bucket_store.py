"""An object store in this process: flat keys, whole puts, ranges, no folders, no rename, no append.

Its files are read in the way of s3fs's and gcsfs's; `fetched` counts what went over the line.
"""

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class BucketFile(AbstractBufferedFile):
    """Reads ranges through fsspec's caches; written at once when closed."""

    def _fetch_range(self, start, end):
        data = self.fs.objects[self.path][start:end]
        self.fs.fetched.append((self.path, len(data)))
        return data

    def _initiate_upload(self):
        self.parts = []

    def _upload_chunk(self, final=False):
        self.parts.append(self.buffer.getvalue())
        if final:
            self.fs.objects[self.path] = b"".join(self.parts)
        return True


class BucketStore(AbstractFileSystem):
    """bucket://NAME/KEY"""

    protocol = "bucket"
    objects: dict[str, bytes] = {}  # noqa: RUF012  # one store for all who open it
    fetched: list[tuple[str, int]] = []  # noqa: RUF012
    answers = True

    def info(self, path, **kwargs):
        if not BucketStore.answers:
            raise ConnectionAbortedByPeer("no credentials found")
        path = self._strip_protocol(path)
        if path in self.objects:
            return {"name": path, "size": len(self.objects[path]), "type": "file"}
        if any(key.startswith(path + "/") for key in self.objects):
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        path = self._strip_protocol(path)
        below = {
            path + "/" + key[len(path) + 1 :].split("/")[0]
            for key in self.objects
            if key.startswith(path + "/")
        }
        names = [path] if path in self.objects else sorted(below)
        if not names:
            raise FileNotFoundError(path)
        return [self.info(name) if detail else name for name in names]

    def put_file(self, lpath, rpath, callback=None, mode="overwrite", **kwargs):
        assert not kwargs
        rpath = self._strip_protocol(rpath)
        if mode == "create" and rpath in self.objects:
            raise FileExistsError(rpath)
        with open(lpath, "rb") as handle:
            self.objects[rpath] = handle.read()

    def _rm(self, path):
        del self.objects[self._strip_protocol(path)]

    def _open(self, path, mode="rb", block_size=None, autocommit=True, **kwargs):
        kwargs.pop("cache_options", None)
        size = self.info(path)["size"] if mode == "rb" else None
        return BucketFile(self, path, mode, block_size or 2**16, size=size, **kwargs)


class ConnectionAbortedByPeer(Exception):
    """A driver's own error, which is no OSError."""


fsspec.register_implementation("bucket", BucketStore, clobber=True)


def fill(prefix, folder):
    """Copies a local folder to bucket://PREFIX."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            key = f"{prefix}/{path.relative_to(folder).as_posix()}"
            BucketStore.objects[key] = path.read_bytes()
    return f"bucket://{prefix}"


def stored(prefix):
    """Every object below a prefix, by relative name."""
    return {
        key.removeprefix(prefix + "/"): data
        for key, data in sorted(BucketStore.objects.items())
        if key.startswith(prefix + "/")
    }
