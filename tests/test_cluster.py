"""The files for clusters are what Ray accepts."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

CLUSTER = Path(__file__).parent.parent / "cluster"


def test_the_ray_up_file_passes_ray_s_schema() -> None:
    config = yaml.safe_load((CLUSTER / "aws-gpu.yaml").read_text())
    validate_config(prepare_config(config))
    assert config["head_node_type"] in config["available_node_types"]
    assert all("RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(config) | {"nonsense": 1})
