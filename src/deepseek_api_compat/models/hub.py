"""The two public hubs of models: where a repository's files are, and their hashes."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import TypeVar
from urllib.parse import quote

import httpx
import msgspec

from deepseek_api_compat import config
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fetch
from deepseek_api_compat.models.catalogue import Hub
from deepseek_api_compat.models.fetch import Remote

T = TypeVar("T")


class HuggingFace:
    """https://huggingface.co/docs/hub/api, or a mirror with the same paths (`HF_ENDPOINT`)."""

    _remedy = (
        "check the network (HTTPS_PROXY for a proxy), set HF_ENDPOINT to a mirror, or add --from modelscope"
    )

    def __init__(self) -> None:
        self._base = config.huggingface_endpoint()
        token = config.huggingface_token()
        self._headers = {"authorization": f"Bearer {token}"} if token else {}

    def file(self, repo: str, path: str, size: int | None = None, sha256: str | None = None) -> Remote:
        url = f"{self._base}/{repo}/resolve/main/{quote(path)}"
        return Remote(url, _safe(path), "Hugging Face", self._remedy, size, sha256, self._headers)

    def files(self, http: httpx.Client, repo: str) -> list[Remote]:
        about, found = _listing_of(repo, self.file(repo, "-")), list[Remote]()
        url: str | None = f"{self._base}/api/models/{repo}/tree/main?recursive=true"
        while url:
            response = fetch.get(http, url, about)
            for item in _decode(response, list[_HuggingFaceItem], about):
                if item.type == "file":
                    found.append(self.file(repo, item.path, item.size, item.lfs.oid if item.lfs else None))
            url = response.links.get("next", {}).get("url")
        return found


class ModelScope:
    """The API that the `modelscope` package itself uses (`HubApi.get_model_files`, `file_download`)."""

    _remedy = "check the network (HTTPS_PROXY for a proxy), or leave out --from modelscope"

    def __init__(self) -> None:
        self._base = f"{config.modelscope_endpoint()}/api/v1/models"

    def file(self, repo: str, path: str, size: int | None = None, sha256: str | None = None) -> Remote:
        url = f"{self._base}/{repo}/repo?Revision=master&FilePath={quote(path, safe='')}"
        return Remote(url, _safe(path), "ModelScope", self._remedy, size, sha256)

    def files(self, http: httpx.Client, repo: str) -> list[Remote]:
        about = _listing_of(repo, self.file(repo, "-"))
        response = fetch.get(http, f"{self._base}/{repo}/repo/files?Revision=master&Recursive=true", about)
        listing = _decode(response, _ModelScopeListing, about)
        return [
            self.file(repo, item.path, item.size, item.sha256 or None)
            for item in listing.data.files
            if item.type != "tree"
        ]


def named(name: Hub) -> HuggingFace | ModelScope:
    return HuggingFace() if name == "huggingface" else ModelScope()


def _listing_of(repo: str, file: Remote) -> Remote:
    """Like `file`, but named for what it is when the listing fails."""
    return msgspec.structs.replace(file, path=f"the list of files of {repo}")


class _Lfs(msgspec.Struct):
    oid: str


class _HuggingFaceItem(msgspec.Struct):
    type: str
    path: str
    size: int = 0
    lfs: _Lfs | None = None


class _ModelScopeItem(msgspec.Struct, rename="pascal"):
    path: str
    type: str = "blob"
    size: int = 0
    sha256: str = ""


class _ModelScopeFiles(msgspec.Struct, rename="pascal"):
    files: list[_ModelScopeItem] = []


class _ModelScopeListing(msgspec.Struct, rename="pascal"):
    data: _ModelScopeFiles


def _decode(response: httpx.Response, kind: type[T], about: Remote) -> T:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError:
        raise ModelError(
            f"{about.site} ({response.url.host}) did not answer with a list of files; {about.remedy}."
        ) from None


def _safe(path: str) -> str:
    """A hub is not trusted to choose where on this disk its files go."""
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise ModelError(f"The repository has a file with the unsafe path {path!r}, so nothing was fetched.")
    return path
