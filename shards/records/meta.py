"""What a record says about its input in words: the `json` member."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ModelWrapValidatorHandler, PositiveInt, ValidationError, model_validator

from common.errors import DataError
from common.files import canonical_json
from common.toml import Section, describe, require

Text = Annotated[str, Field(min_length=0)]
"""With a bound pydantic looks at the characters, and refuses a lone surrogate: it has no UTF-8."""
Texts = Annotated[tuple[Text, ...], Field(strict=False)]
Corner = Annotated[tuple[float, float], Field(strict=False)]
Corners = Annotated[tuple[Corner, ...], Field(strict=False, min_length=3)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SampleMeta(Section):
    """An input, and how it was solved. Same keys and types in every sample, never null.

    Raises:
        DataError: a field has another type or value; the message names it.
    """

    input_id: Annotated[str, Field(min_length=1)]
    """Hash of the input's content."""
    caption: Text
    """Image caption as the teacher saw it, suffix included."""
    text_caption: Text
    """Text caption with one `*` per line."""
    texts: Annotated[Texts, Field(min_length=1)]
    """The lines of text, at least one."""
    languages: Texts
    """Of each line, e.g. "Latin" or "Chinese"."""
    polygons: Annotated[tuple[Corners, ...], Field(strict=False)]
    """Of each line: corners (x, y) in pixels of `size`, three or more."""
    mode: Literal["generate", "edit"]
    source: Literal["rollout", "noised", "student"]
    """"rollout" (the teacher's solves), "noised" (data latents with noise), or "student" (a student's own states,
    each with where the teacher goes from it)."""
    seeds: Annotated[tuple[Seed, ...], Field(strict=False, min_length=1)]
    """Seed of each rollout's noise."""
    size: Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
    """(height, width) in pixels."""
    guidance_scale: float
    """s in eps_u + s (eps_c - eps_u)."""

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, values: object, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(values, dict):
            raise DataError(f"received {values!r:.80}, expected a JSON object")
        where = f"record {values.get('input_id', '')!r:.80}"
        try:
            meta = handler(values)
            for key, received in (("languages", meta.languages), ("polygons", meta.polygons)):
                require(len(received) == len(meta.texts), key, received, f"{len(meta.texts)}, one per line")
        except ValidationError as error:
            raise DataError(f"{where}: {describe(error, cls)}") from None
        except ValueError as error:  # of `require`
            raise DataError(f"{where}: {error}") from None
        return meta

    def to_json(self) -> bytes:
        """Serialise; equal metadata gives equal bytes."""
        return canonical_json(self.model_dump())

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Self:
        """Parse and check the `json` member.

        Args:
            data: the member's bytes.
            where: what is read, for errors.

        Raises:
            DataError: not JSON, a key missing or unknown, or a value refused by the schema.
        """
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:  # before there are any fields
            raise DataError(f"{where}: {describe(error)}") from None
        except DataError as error:
            raise DataError(f"{where}: {error}; is it of another version?") from None
