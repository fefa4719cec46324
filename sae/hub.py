"""Dictionaries in repositories: of the Hugging Face Hub, or folders that are laid out like one.

A repository is `owner/name` (or `hf://owner/name`) on the Hub; what begins with `.`, `/` or the address of an object store is a folder.
What is pushed and pulled is a list of names, and nothing else: train.json and logs, which name paths and machines, stay at home.
"""

import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from cache.errors import HearsaeError, RemoteError
from cache.location import Location, location, names_below, names_in, put
from sae.card import CARD, PLOT, PLOTS, SAELENS, model_card
from sae.interop import saelens
from sae.models import CONFIG, WEIGHTS, Dictionary, load_dictionary

__all__ = ["pull", "push"]

Result = TypeVar("Result")

SAELENS_FILES = (saelens.CONFIG, saelens.WEIGHTS)
HUB_NAME = re.compile(r"(?:hf://)?(\w[\w.-]*/\w[\w.-]*)", re.ASCII)
LONGEST_REASON = 300
"""Characters of what a hub answered that an error shows."""


def push(folder: str | Location, repo: str, *, license_name: str = "", private: bool = False) -> list[str]:
    """Uploads the dictionary in `folder`, with its card, plots and SAELens export where there are any; returns the names of the files.

    Where there is no README.md a card is made for the repository, by `sae.card.model_card`. license_name: for that card.
    private: whether a repository that has to be made is. The Hub's token is that of `hf auth login` or HF_TOKEN.
    Raises HearsaeError if there is no sound dictionary, RemoteError if the Hub refuses or can't be reached.
    """
    folder, hub = location(folder), _hub_name(repo)
    dictionary = load_dictionary(folder)
    files = {name: folder / name for name in _names(folder)}
    _check_saelens(dictionary, files)
    if license_name and CARD in files:
        raise HearsaeError(f"{folder} has a {CARD} of its own, which is what is pushed: write the licence into it, or delete it for a new one")
    card = None if CARD in files else model_card(folder, hub or "", license_name).encode()
    if hub is None:
        target = location(repo)
        if _same(target, folder):
            raise HearsaeError(f"{target} is the folder that is to be pushed: name another")
        _copy(files, target, card)
    else:
        with tempfile.TemporaryDirectory(prefix="hearsae-") as staged:
            _copy(files, Path(staged), card)
            _ask(hub, lambda api: _upload(api, hub, staged, private))
    return sorted({*files, CARD})


def pull(repo: str, folder: str | Location, *, revision: str | None = None) -> list[str]:
    """Downloads a dictionary into a new folder, with its card, plots and SAELens export; returns the names of the files.

    revision: branch, tag or commit on the Hub. Nothing appears in `folder` before weights and config have been read without complaint.
    Raises HearsaeError if the folder holds anything or the repository has no sound dictionary, RemoteError if the Hub refuses or can't be reached.
    """
    folder, hub = location(folder), _hub_name(repo)
    if names_in(folder):
        raise HearsaeError(f"{folder} holds files already: give a new folder")
    if hub is None and revision:
        raise HearsaeError(f"--revision {revision} has no meaning for the folder {repo}: leave it out")
    with _downloaded(hub, revision) if hub else _folder(location(repo)) as source:
        try:
            load_dictionary(source)
        except HearsaeError as error:
            raise HearsaeError(str(error).replace(str(source), repo)) from None
        files = {name: source / name for name in _names(source)}
        _copy(files, folder)
    return sorted(files)


def _hub_name(repo: str) -> str | None:
    """`owner/name`, or None for a folder. Raises HearsaeError for what is neither."""
    if re.match(r"[./]|(s3|gs)://", repo):
        return None
    found = HUB_NAME.fullmatch(repo)
    if not found:
        raise HearsaeError(f"'{repo}' is no repository: write owner/name for one on the Hub, or ./folder")
    return found[1]


def _is_pushed(name: str) -> bool:
    first, _, rest = name.partition("/")
    plot = first == PLOTS and PLOT.fullmatch(rest)
    return name in (CONFIG, WEIGHTS, CARD) or bool(plot) or (first == SAELENS and rest in SAELENS_FILES)


def _names(folder: Location) -> list[str]:
    """What is pushed and pulled of a folder, weights first and the config last: without it there is no dictionary. Links may not lead out."""
    names = sorted(filter(_is_pushed, names_below(folder)), key=lambda name: (name == CONFIG, name != WEIGHTS, name))
    for name in names:
        if isinstance(folder, Path) and not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise HearsaeError(f"{folder / name} is a link out of its folder: put the file there")
    return names


def _check_saelens(dictionary: Dictionary, files: dict[str, Location]) -> None:
    """Raises HearsaeError if the export beside a dictionary is not, or no longer, one of it."""
    there = {name: files[f"{SAELENS}/{name}"] for name in SAELENS_FILES if f"{SAELENS}/{name}" in files}
    if there:
        made = saelens.files(dictionary)
        if set(there) != set(SAELENS_FILES) or made[saelens.WEIGHTS] != there[saelens.WEIGHTS].read_bytes():
            raise HearsaeError(f"{next(iter(there.values())).parent} is no export of the SAE beside it: delete it, or run 'hearsae export' again")


def _same(one: Location, other: Location) -> bool:
    return one.resolve() == other.resolve()


def _copy(files: dict[str, Location], target: Location, card: bytes | None = None) -> None:
    if card is not None:
        put(target / CARD, card)
    for name, source in files.items():
        put(target / name, source.read_bytes())


# The Hub


@contextmanager
def _folder(folder: Location) -> Iterator[Location]:
    yield folder


@contextmanager
def _downloaded(hub: str, revision: str | None) -> Iterator[Location]:
    """A folder with the files of a repository that are pulled, for as long as they are needed."""
    with tempfile.TemporaryDirectory(prefix="hearsae-") as place:
        _ask(hub, lambda api: _download(api, hub, revision, Path(place)))
        yield Path(place)


def _upload(api: Any, hub: str, staged: str, private: bool) -> None:
    # Without an opinion on visibility where there is none to have: an organisation's default stands.
    api.create_repo(hub, exist_ok=True, private=private or None)
    api.upload_folder(repo_id=hub, folder_path=staged, commit_message="Upload with hearsae")


def _download(api: Any, hub: str, revision: str | None, place: Path) -> None:
    info = api.model_info(hub, revision=revision)
    names = [file.rfilename for file in info.siblings or () if _is_pushed(file.rfilename)]
    if not {CONFIG, WEIGHTS} <= set(names):
        raise HearsaeError(f"there is no SAE of hearsae in {hub}: it has no {' and no '.join(sorted({CONFIG, WEIGHTS} - set(names)))}")
    # Names out of `_is_pushed` hold nothing that a pattern could take for more than itself.
    api.snapshot_download(hub, revision=info.sha, allow_patterns=names, local_dir=place)


def _ask(hub: str, request: Callable[[Any], Result]) -> Result:
    """What the Hub's own client makes of a request. All that fails there is one line here."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    quiet = not sys.stderr.isatty() and not are_progress_bars_disabled()
    if quiet:
        disable_progress_bars()
    try:
        return request(HfApi(library_name="hearsae"))
    except HearsaeError:
        raise
    except Exception as error:  # of its transport, of its answers, of its checks: they share no class
        raise RemoteError(_reason(hub, error)) from error
    finally:
        if quiet:
            enable_progress_bars()


def _reason(hub: str, error: Exception) -> str:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    said = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if isinstance(error, OfflineModeIsEnabled):
        return f"{hub} is on the Hub, which HF_HUB_OFFLINE forbids to ask: unset it, or use a folder"
    if isinstance(error, RevisionNotFoundError):
        return f"{hub} on the Hub has no such revision: {said}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub at {ENDPOINT} has no repository {hub}, or it is private: check the name, or log in with 'hf auth login'"
    if status in (401, 403):
        return f"the Hub at {ENDPOINT} does not allow that with {hub} ({status}): log in with 'hf auth login', or set HF_TOKEN to a token that may"
    if status is None:
        return f"the Hub at {ENDPOINT} can't be asked for {hub}: {said}"
    return f"the Hub at {ENDPOINT} does not do that with {hub}: {said}"
