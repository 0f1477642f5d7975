"""OpenVINO is an extra: where it is not installed, its tests are skipped and say so."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

needs_openvino = pytest.mark.skipif(not find_spec("openvino"), reason="openvino is not installed: saccade[openvino]")
