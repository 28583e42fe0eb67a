"""Settings from the environment and `.env`, frozen; no database is touched here."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from revector.errors import UsageError

#: The model that `--to` means when it is not given.
DEFAULT_MODEL = "all-mpnet-base-v2"


class Settings(BaseSettings):
    """What the environment says: where the database is, which model is wanted.

    `DATABASE_URL` absent means libpq's own variables (`PGHOST`, `PGSERVICE`, ...). Variables win over `.env`.
    """

    model_config = SettingsConfigDict(
        env_file=".env", env_file_encoding="utf-8", extra="ignore", frozen=True, env_ignore_empty=True
    )

    #: A libpq URL or keyword string; SQLAlchemy's `postgresql+psycopg://` is accepted. Never printed.
    database_url: SecretStr = SecretStr("")
    #: The model to upgrade to.
    embedding_model: str = DEFAULT_MODEL
    #: The dimension expected of `embedding_model`; None: the model's own.
    embedding_dimension: Annotated[int | None, Field(gt=0, le=16000)] = None
    #: Where `openai:NAME` models answer; any compatible server.
    openai_base_url: str = "https://api.openai.com/v1"
    #: The key for it. Never printed.
    openai_api_key: SecretStr = SecretStr("")

    @field_validator("database_url")
    @classmethod
    def _plain_scheme(cls, value: SecretStr) -> SecretStr:
        return SecretStr(re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", value.get_secret_value().strip()))

    @classmethod
    def load(cls) -> Settings:
        """Read the environment; a bad value is a `UsageError` that names the variable, never its content."""
        try:
            return cls()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            name = str(first["loc"][0]).upper() if first["loc"] else "a setting"
            raise UsageError(
                f"{name} is not usable: {first['msg']}", hint=f"correct {name} in the environment or .env"
            ) from None
