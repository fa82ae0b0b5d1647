"""Search of the Hugging Face Hub for LoRA adapters of a base model.

An adapter's model card names its base model, which the Hub turns into a tag: ``base_model:adapter:<id>``. See
https://huggingface.co/docs/hub/model-cards#specifying-a-base-model. Ranks come from each ``adapter_config.json``.
"""

from __future__ import annotations

import html
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from tqdm import tqdm

from ..core.report import html_table, text_table

#: seconds to wait for each answer
TIMEOUT = 10
#: how many repositories are read at the same time
WORKERS = 8


@dataclass(frozen=True)
class FoundAdapter:
    """A LoRA adapter on the Hub. Unknown values are None.

    Parameters
    ----------
    repo_id:
        The id to pass to :func:`hotswap_lab.hotswap_adapter` and the other functions.
    rank, max_rank:
        ``r`` of its config, and the highest rank of any layer, which a prepared model needs room for.
    nbytes:
        The size of its weights in bytes.
    license:
        The license in the model card, such as ``"apache-2.0"``.
    downloads:
        How often it was downloaded in the last 30 days.
    last_modified:
        The time of the last push.
    revision:
        The commit that these values are from. Pass it as ``revision=`` to get that version.
    gated:
        Whether users must meet a condition of the author to get it.
    """

    repo_id: str
    rank: int | None = None
    max_rank: int | None = None
    nbytes: int | None = None
    license: str | None = None
    downloads: int | None = None
    last_modified: datetime | None = None
    revision: str | None = None
    gated: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """The adapter's line of the table."""
        rank = "-" if self.rank is None else str(self.rank)
        return (
            self.repo_id + (" (gated)" if self.gated else ""),
            rank if self.max_rank == self.rank else f"{rank}, up to {self.max_rank}",
            "-" if self.nbytes is None else f"{tqdm.format_sizeof(self.nbytes)}B",
            self.license or "-",
            "-" if self.downloads is None else f"{self.downloads:,}",
            "-" if self.last_modified is None else f"{self.last_modified:%Y-%m-%d}",
        )


class FoundAdapters(list[FoundAdapter]):
    """The result of :func:`find_adapters`: a list of :class:`FoundAdapter` that is shown as a table.

    Parameters
    ----------
    rows:
        The adapters, in the order of the Hub.
    base_model_id:
        The base model that was searched for.
    note:
        One line: how many were found and left out, or why the Hub could not be reached.
    """

    COLUMNS = ("adapter", "rank", "size", "license", "downloads", "updated")

    def __init__(self, rows: list[FoundAdapter], base_model_id: str, note: str):
        super().__init__(rows)
        self.note = note
        self.title: str = f"LoRA adapters for {base_model_id}"

    def __str__(self) -> str:
        table = text_table(self.COLUMNS, [row.cells for row in self]) if self else []
        return "\n".join([f"{self.title}: {self.note}", *table])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        if not self:
            return f"<div>{html.escape(str(self))}</div>"
        return html_table(self.title, self.COLUMNS, [row.cells for row in self], caption=self.note)


def find_adapters(
    base_model_id: str, *, limit: int = 20, token: bool | str | None = None, sort: str = "downloads"
) -> FoundAdapters:
    """List the LoRA adapters on the Hugging Face Hub for a base model, with rank, size and license.

    The list has every repository whose model card names ``base_model_id`` as its base model, and whose
    ``adapter_config.json`` says LORA. Other kinds of adapters are left out and counted, as are repositories without
    that file, such as LoRA in diffusers' own format (which :func:`hotswap_lab.hotswap_pipeline` reads). A repository
    whose config can't be read, for example because it is gated, is listed with "-" for its rank.

    Only the configs are downloaded, a few hundred bytes each. They are not cached.

    Parameters
    ----------
    base_model_id:
        The id of the base model on the Hub.
    limit:
        How many repositories to look at, the first ones in the given order. The Hub lists at most 1,000.
    token:
        A token, to see private and gated repositories as well. Default: the one that you are logged in with.
    sort:
        ``"downloads"``, ``"likes"``, ``"created_at"``, ``"last_modified"`` or ``"trending_score"``; largest first.

    Returns
    -------
    FoundAdapters
        Entries with ``repo_id``, ``rank``, ``nbytes``, ``license`` and more, shown as a table. If the Hub can't be
        reached, for example offline, it is empty and says so in one line. No request is repeated, and none takes longer
        than ten seconds.

    Raises
    ------
    ValueError
        If ``base_model_id`` is not the id of a model.

    Examples
    --------
    >>> from hotswap_lab import find_adapters
    >>> found = find_adapters("HuggingFaceTB/SmolLM2-135M-Instruct", limit=3)
    >>> print(found)  # doctest: +ELLIPSIS
    LoRA adapters for HuggingFaceTB/SmolLM2-135M-Instruct: ...
    >>> small = [each.repo_id for each in found if each.rank and each.rank <= 16]
    >>> len(small) <= len(found) <= 3
    True
    """
    validate_repo_id(base_model_id)
    try:
        listed = _listed(base_model_id, limit, token, sort)
    except (OSError, HTTPError, ValueError) as error:
        return FoundAdapters([], base_model_id, _reason(error))
    with ThreadPoolExecutor(WORKERS) as threads:
        looked_at = list(threads.map(lambda repo_id: _look_into(repo_id, token), listed))
    rows = [each for each in looked_at if isinstance(each, FoundAdapter)]
    left_out = Counter(each for each in looked_at if isinstance(each, str))
    note = f"{len(rows)} of {len(listed)} repositories" if left_out else f"{len(rows)} repositories"
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return FoundAdapters(rows, base_model_id, f"{note}; left out: {reasons}" if reasons else note)


def _listed(base_model_id: str, limit: int, token: bool | str | None, sort: str) -> list[str]:
    """List repositories without ``HfApi.list_models``, which retries for half a minute and has no timeout."""
    first, *words = sort.split("_")  # the Hub calls last_modified lastModified
    query = {"filter": f"base_model:adapter:{base_model_id}", "sort": first + "".join(map(str.title, words))}
    return [each["id"] for each in _get(f"{constants.ENDPOINT}/api/models", token, limit=limit, **query)]


def _get(url: str, token: bool | str | None, **query: object) -> object:
    headers = build_hf_headers(token=token, library_name="hotswap_lab")
    response = get_session().get(url, params=query, headers=headers, timeout=TIMEOUT)
    hf_raise_for_status(response)
    return response.json()


def _look_into(repo_id: str, token: bool | str | None) -> FoundAdapter | str:
    """The adapter in a repository, or the reason why it is left out."""
    try:
        info = HfApi().model_info(repo_id, files_metadata=True, timeout=TIMEOUT, token=token)
    except (OSError, HTTPError, ValueError):
        return FoundAdapter(repo_id)  # an error with one repository doesn't keep the others from being listed
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    if CONFIG_NAME not in sizes:
        return f"without {CONFIG_NAME}"
    rank = highest = None
    try:
        config = _get(hf_hub_url(repo_id, CONFIG_NAME, revision=info.sha), token)
        if config["peft_type"] != "LORA":
            return "of another kind"
        rank, highest = config["r"], max([config["r"], *(config.get("rank_pattern") or {}).values()])
    except (OSError, HTTPError, ValueError, TypeError, LookupError, AttributeError):
        pass  # the repository is gated, or its config was not written by PEFT
    licenses = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    return FoundAdapter(
        repo_id,
        rank,
        highest,
        sizes.get(SAFETENSORS_WEIGHTS_NAME) or sizes.get(WEIGHTS_NAME),
        ", ".join(licenses) or None,
        info.downloads,
        info.last_modified,
        info.sha,
        bool(info.gated),
    )


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "offline, HF_HUB_OFFLINE is set, and only the Hub knows them"
    text = " ".join(str(error).split())[:120]
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refuses to list them: {text}"
    return f"offline, or the Hub can't be reached ({type(error).__name__}: {text}), and only the Hub knows them"
