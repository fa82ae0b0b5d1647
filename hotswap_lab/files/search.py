"""What there is to swap in: the LoRA adapters on the Hugging Face Hub for a base model, as a table.

An adapter's model card names its base model, and the Hub makes a tag of it: ``base_model:adapter:<id>``. See
https://huggingface.co/docs/hub/model-cards#specifying-a-base-model. Ranks come from each ``adapter_config.json``.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi, ModelInfo, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, validate_repo_id
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .. import __version__
from ..core.errors import refuse
from ..core.report import html_table

#: what the results can be sorted by, the largest or latest first, and what the Hub calls it
SORTS = {
    "downloads": "downloads",
    "likes": "likes",
    "created_at": "createdAt",
    "last_modified": "lastModified",
    "trending_score": "trendingScore",
}
#: what is wanted of each repository in the Hub's list
EXPAND = ("cardData", "downloads", "gated", "lastModified", "sha", "siblings", "tags")
#: how long to wait for each answer, in seconds: (to connect, to read, to write, for a free connection)
TIMEOUT = (5, 10, 10, 30)
#: how many repositories are looked into at the same time
WORKERS = 8
#: a larger adapter_config.json, in bytes, is none
LARGEST_CONFIG = 1 << 20


@dataclass(frozen=True)
class FoundAdapter:
    """A LoRA adapter on the Hub. What could not be found out is None.

    Parameters
    ----------
    repo_id:
        What :func:`hotswap_lab.hotswap_adapter` and the other functions take.
    rank, max_rank:
        ``r`` of its config, and the highest rank of any layer, which room must be made for.
    nbytes:
        The size of its weights in bytes.
    licence:
        As its model card says, such as ``"apache-2.0"``.
    downloads:
        How often it was downloaded in the last 30 days.
    last_modified:
        When something was last pushed to it.
    revision:
        The commit that all of this is of: pass it on as ``revision=`` to get just that.
    gated:
        Whether its author lets everybody have it only on some condition.
    """

    repo_id: str
    rank: int | None = None
    max_rank: int | None = None
    nbytes: int | None = None
    licence: str | None = None
    downloads: int | None = None
    last_modified: datetime | None = None
    revision: str | None = None
    gated: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """Its row of the table."""
        rank = "-" if self.rank is None else str(self.rank)
        return (
            self.repo_id + (" (gated)" if self.gated else ""),
            rank if self.max_rank == self.rank else f"{rank}, up to {self.max_rank}",
            "-" if self.nbytes is None else _size(self.nbytes),
            self.licence or "-",
            "-" if self.downloads is None else f"{self.downloads:,}",
            "-" if self.last_modified is None else f"{self.last_modified:%Y-%m-%d}",
        )


@dataclass(frozen=True)
class FoundAdapters:
    """What :func:`find_adapters` found: a sequence of :class:`FoundAdapter` that shows itself as a table.

    Parameters
    ----------
    base_model_id:
        What was searched for.
    rows:
        The adapters, in the order of the Hub.
    note:
        One line: how many there are and what was left out, or why the Hub could not be asked.
    """

    base_model_id: str
    rows: tuple[FoundAdapter, ...]
    note: str

    COLUMNS = ("adapter", "rank", "size", "licence", "downloads", "updated")

    def __iter__(self) -> Iterator[FoundAdapter]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> FoundAdapter:
        return self.rows[number]

    def __str__(self) -> str:
        title = f"LoRA adapters for {self.base_model_id}: {self.note}"
        if not self.rows:
            return title
        table = [self.COLUMNS, *(row.cells for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, cells, widths)).rstrip() for cells in table]
        return "\n".join([title, *lines])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        title = f"LoRA adapters for {self.base_model_id}"
        if not self.rows:
            return f"<div><strong>{html.escape(title)}</strong>: {html.escape(self.note)}</div>"
        return html_table(title, self.COLUMNS, [row.cells for row in self.rows], caption=self.note)


def find_adapters(
    base_model_id: str, *, limit: int = 20, token: bool | str | None = None, sort: str = "downloads"
) -> FoundAdapters:
    """Lists the LoRA adapters on the Hugging Face Hub for a base model, with rank, size and licence.

    Listed is every repository whose model card names ``base_model_id`` as the base it is an adapter for, and whose
    ``adapter_config.json`` says LORA. Left out, and counted, are other kinds of adapters and repositories without that
    file, such as LoRA in diffusers' own format (which :func:`hotswap_lab.hotswap_pipeline` reads). Where the config
    can't be had, because the repository is gated for instance, it is listed with "-" for its rank.

    Nothing is downloaded but the configs, a few hundred bytes each; nothing goes into the cache.

    Parameters
    ----------
    base_model_id:
        The id of the base model on the Hub.
    limit:
        How many repositories to look at, the first ones in the given order.
    token:
        Your token, to see private and gated repositories as well. Default: the one that you are logged in with.
    sort:
        ``"downloads"``, ``"likes"``, ``"created_at"``, ``"last_modified"`` or ``"trending_score"``; largest first.

    Returns
    -------
    FoundAdapters
        Rows with ``repo_id``, ``rank``, ``nbytes``, ``licence`` and more; shows itself as a table, as text and in a
        notebook. Where the Hub can't be asked, offline for instance, it has no rows and says so in one line: no
        request is repeated, and none is waited for longer than ten seconds.

    Raises
    ------
    HotswapError
        If ``base_model_id``, ``limit`` or ``sort`` can't be right. It is a ``ValueError``.

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
    _check(base_model_id, limit, sort)
    try:
        listed = _listed(base_model_id, limit, token, sort)
    except (OSError, HTTPError, ValueError) as error:
        return FoundAdapters(base_model_id, (), _reason(error))
    with ThreadPoolExecutor(WORKERS) as threads:
        looked_at = list(threads.map(lambda info: _look_into(info, token), listed))
    rows = tuple(each for each in looked_at if isinstance(each, FoundAdapter))
    left_out = Counter(each for each in looked_at if isinstance(each, str))
    note = f"{len(rows)} of {len(listed)} repositories" if left_out else f"{len(rows)} repositories"
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    return FoundAdapters(base_model_id, rows, f"{note}; left out: {reasons}" if reasons else note)


def _check(base_model_id: str, limit: int, sort: str) -> None:
    try:
        validate_repo_id(base_model_id)
    except HFValidationError as error:
        raise refuse(
            "This is not the id of a model on the Hub.",
            found=repr(base_model_id),
            expected="an id such as HuggingFaceTB/SmolLM2-135M-Instruct",
            next_step="look the base model up on https://huggingface.co/models",
        ) from error
    if sort not in SORTS or isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise refuse(
            "Adapters can't be listed like that.",
            found=f"limit={limit!r}, sort={sort!r}",
            expected=f"a limit of 1 or more, and one of {', '.join(SORTS)}",
            next_step="correct the argument",
        )


def _listed(base_model_id: str, limit: int, token: bool | str | None, sort: str) -> list[ModelInfo]:
    """What ``HfApi.list_models`` gives, which repeats a request that fails for half a minute and has no time limit."""
    url: str | None = f"{constants.ENDPOINT}/api/models"
    query = {"filter": f"base_model:adapter:{base_model_id}", "sort": SORTS[sort], "limit": limit, "expand": EXPAND}
    found: list[dict] = []
    while url and len(found) < limit:
        response = get_session().get(url, params=query, headers=_headers(token), timeout=TIMEOUT)
        hf_raise_for_status(response)
        page = response.json()
        if not isinstance(page, list):
            raise ValueError(f"a {type(page).__name__} instead of a list")
        found += page
        # the address of the next page has the whole query in it
        url, query = response.links.get("next", {}).get("url"), None
    return [ModelInfo(**each) for each in found[:limit]]


def _look_into(info: ModelInfo, token: bool | str | None) -> FoundAdapter | str:
    """The adapter in a repository, or why it is left out."""
    if CONFIG_NAME not in {file.rfilename for file in info.siblings or ()}:
        return f"without {CONFIG_NAME}"
    sizes, config = {}, None
    try:
        # the list has no sizes, and a repository that is gated still tells them
        detailed = HfApi().model_info(info.id, revision=info.sha, files_metadata=True, timeout=10, token=token)
        sizes = {file.rfilename: file.size for file in detailed.siblings or ()}
        if (sizes.get(CONFIG_NAME) or 0) <= LARGEST_CONFIG:
            url = hf_hub_url(info.id, CONFIG_NAME, revision=info.sha)
            response = get_session().get(url, headers=_headers(token), timeout=TIMEOUT)
            hf_raise_for_status(response)
            config = response.json()
    except (OSError, HTTPError, ValueError):
        pass  # one repository that can't be looked into is no reason not to show the others
    config = config if isinstance(config, dict) else {}
    if config.get("peft_type", "LORA") != "LORA":
        return "of another kind"
    rank, max_rank = _ranks(config)
    return FoundAdapter(
        info.id,
        rank,
        max_rank,
        sizes.get(SAFETENSORS_WEIGHTS_NAME) or sizes.get(WEIGHTS_NAME),
        _licence(info),
        info.downloads,
        info.last_modified,
        info.sha,
        bool(info.gated),
    )


def _ranks(config: dict) -> tuple[int | None, int | None]:
    """``r`` and the highest rank of all, as far as a config that anybody may have written has them."""
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, dict) else ())]
    ranks = [rank if type(rank) is int and rank > 0 else None for rank in ranks]
    return ranks[0], None if None in ranks else max(ranks)


def _licence(info: ModelInfo) -> str | None:
    card = info.card_data
    licence = getattr(card, "license", None)
    if licence == "other":
        licence = getattr(card, "license_name", None) or licence
    if not licence:
        licence = [tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")]
    names = licence if isinstance(licence, list) else [licence]
    # a model card is anybody's text, and this goes into one cell
    text = " ".join(", ".join(map(str, names)).split())
    return "".join(filter(str.isprintable, text))[:40] or None


def _size(nbytes: int) -> str:
    """A size in bytes as people say it.

    >>> [_size(n) for n in (999, 36_800, 9_840_000, 1_300_000_000)]
    ['999 B', '37 kB', '9.8 MB', '1.3 GB']
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            value = nbytes / factor
            return f"{value:.1f} {unit}" if value < 10 else f"{value:.0f} {unit}"
    return f"{nbytes} B"


def _headers(token: bool | str | None) -> dict[str, str]:
    return build_hf_headers(token=token, library_name="hotswap_lab", library_version=__version__)


def _reason(error: Exception) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "offline, HF_HUB_OFFLINE is set, and only the Hub knows them"
    text = " ".join(str(error).split())[:120]
    if isinstance(error, HfHubHTTPError):
        return f"the Hub refuses to list them: {text}"
    return f"offline, or the Hub can't be reached ({type(error).__name__}: {text}), and only the Hub knows them"
