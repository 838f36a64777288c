"""Settings as they are written on Hydra's command line, whose grammar gives some characters a meaning."""

from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException


def override(key: str, text: str | Path) -> str:
    """`key=text`, in quotes where Hydra would read something else in it, such as a list, a sweep or a number.

    `${...}` is OmegaConf's, in quotes too.
    """
    text = str(text)
    return f"{key}={text if _is_read_as_it_is(text) else QuotedString(text, Quote.single).with_quotes()}"


def _is_read_as_it_is(text: str) -> bool:
    try:
        return OverridesParser.create().parse_override(f"key={text}").value() == text
    except HydraException:
        return False
