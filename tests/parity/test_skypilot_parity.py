"""launch/skypilot.yaml against SkyPilot's own schema and reader, which are too large for the other tests."""

import pathlib

import pytest
import yaml

pytestmark = pytest.mark.parity
TASK = pathlib.Path(__file__).resolve().parents[2] / "launch" / "skypilot.yaml"


@pytest.fixture(scope="module")
def sky(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # it writes there when it is imported
        patch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
        import sky

        yield sky


def validate(sky, document):
    from sky.utils import common_utils, schemas

    common_utils.validate_schema(document, schemas.get_task_schema(), "task: ")
    common_utils.validate_schema(document["resources"], schemas.get_resources_schema(), "resources: ")


def test_the_task_fits_the_schema(sky):
    document = yaml.safe_load(TASK.read_text())
    validate(sky, document)
    (resources,) = sky.Task.from_yaml(str(TASK)).resources
    assert resources.accelerators == {"H100": 8}
    assert resources.use_spot


@pytest.mark.parametrize("wrong", [{"num_node": 1}, {"resources": {"accelerator": "H100:8"}}, {"envs": [1]}])
def test_the_schema_would_notice(wrong, sky):
    document = yaml.safe_load(TASK.read_text()) | wrong
    with pytest.raises(ValueError, match="task: |resources: "):
        validate(sky, document)
