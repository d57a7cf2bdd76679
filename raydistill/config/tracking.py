"""tracking: where MLflow records."""

from __future__ import annotations

from pydantic import model_validator

from raydistill.config.section import Section


class Tracking(Section):
    enabled: bool = True
    """false: no MLflow run."""
    uri: str | None = None
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, or SQLite in the workspace."""

    @model_validator(mode="after")
    def _store(self) -> Tracking:
        uri = self.uri or "://"
        scheme, _, rest = uri.partition(":")
        if "://" not in uri and scheme in ("http", "https", "sqlite", "postgresql", "mysql"):
            meant = f"{scheme}:{'///' if scheme == 'sqlite' else '//'}{rest.lstrip('/')}"
            raise ValueError(f"tracking.uri={uri}: an address has slashes; did you mean {meant}?")
        if uri.startswith("file:") or not (uri.startswith("databricks") or "://" in uri):
            raise ValueError(
                f"tracking.uri={self.uri} is a folder, where MLflow no longer keeps runs; use "
                "sqlite:////PATH/mlflow.db or a server's http://HOST:PORT"
            )
        return self
