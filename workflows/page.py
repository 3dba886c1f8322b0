"""Pages from templates: every value escaped, a missing one an error."""

from __future__ import annotations

import time
from typing import Any

import jinja2

from workflows.pictures import depth_scale


def render(template: str, **values: Any) -> str:
    """The page as HTML. Raises jinja2.UndefinedError where the template asks for a value that is not given."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("workflows", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    return environment.get_template(template).render(made=made, scale=depth_scale(), **values)
