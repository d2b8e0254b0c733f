"""Values as JSON holds them: those of parquet files, too, which have dates, bytes, decimals and NaN.

In: a value. Out: the same value where JSON can hold it; else dates as ISO text, bytes as base64, NaN and infinity as
null, and anything else as text.
Cost: a value that JSON can hold is not copied.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

_STRICT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False)


def as_text(value: Any) -> str:
    """Return JSON of a value, in one line."""
    try:
        return _STRICT.encode(value)
    except (TypeError, ValueError):
        return _STRICT.encode(as_json(value))


def as_json(value: Any) -> Any:
    """Return a value as JSON can hold it."""
    if isinstance(value, dict):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
