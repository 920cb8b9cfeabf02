"""ORCA load reports in each format, and what is none."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol_server.common.envoy_messages import OrcaLoadReport
from flowcontrol_server.sources.engine_metrics import EngineLoad
from flowcontrol_server.sources.orca import HEADERS, LENGTH_MAX, read_report

HEADER = HEADERS[0]
NAMED = {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}
EXPECTED = EngineLoad(waiting=3, running=None, kv_usage=0.4)
VLLM = "named_metrics.kv_cache_usage_perc=0.4, named_metrics.num_requests_waiting=3.0"
REPORT = OrcaLoadReport(named_metrics=NAMED)
BINARY = base64.b64encode(REPORT.SerializeToString(deterministic=True)).decode()
UTILIZATION = OrcaLoadReport(application_utilization=1.25)
JSON = '{"named_metrics": {"kv_cache_usage_perc": 0.4, "num_requests_waiting": 3.0}}'


class TestFormats:
    """The same report, however it is written."""

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            # vLLM's, character by character
            (
                HEADER,
                f"TEXT {VLLM}",
            ),
            (HEADER, f"JSON {JSON}"),
            # Envoy's
            (
                HEADER,
                "named_metrics.kv_cache_usage_perc:0.4,named_metrics.num_requests_waiting:3",
            ),
            (HEADER, f"BIN {BINARY}"),
            (HEADERS[1], JSON),
            (HEADERS[1], JSON.replace("named_metrics", "namedMetrics")),
            (HEADERS[2], BINARY),
            (HEADERS[2], BINARY.rstrip("=")),
            (HEADER, f"  TEXT {', '.join(f'{k} = {v}' for k, v in NAMED.items())} ,"),
        ],
    )
    def test_formats(self, name: str, value: str) -> None:
        """Each is read."""
        assert read_report({"content-type": "text/plain", name: value}) == EXPECTED

    def test_values_out_of_range(self) -> None:
        """A value that cannot be is none; the others stand."""
        value = "TEXT kv_cache_usage_perc=40, num_requests_waiting=2, num_requests_running=-1"

        assert read_report({HEADER: value}) == EngineLoad(2, running=None, kv_usage=None)


class TestNone:
    """What is no report."""

    def test_no_header(self) -> None:
        """Most responses have none."""
        assert read_report({"content-type": "text/plain"}) is None

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            (HEADER, "TEXT kv_cache_usage_perc=0.4"),
            (HEADER, "TEXT num_requests_waiting=-1, kv_cache_usage_perc=0.4"),
            (HEADER, 'JSON {"application_utilization": 1.25}'),
            (HEADERS[2], base64.b64encode(UTILIZATION.SerializeToString()).decode()),
        ],
    )
    def test_no_load(self, name: str, value: str) -> None:
        """A report that does not say how many wait is no load."""
        assert read_report({name: value}) is None

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            (HEADER, "TEXT num_requests_waiting"),
            (HEADER, "TEXT num_requests_waiting=many"),
            (HEADER, "TEXT num_requests_waiting=3, kv_cache_usage_perc=nan"),
            (HEADER, "TEXT =3"),
            (HEADER, "JSON"),
            (HEADER, "JSON []"),
            (HEADER, "JSON 3"),
            (HEADER, 'JSON {"named_metrics": {"num_requests_waiting": "3"}}'),
            (HEADER, 'JSON {"named_metrics": {"num_requests_waiting": true}}'),
            (HEADER, "JSON " + "[" * 10_000),
            (HEADER, "JSON " + JSON.replace("3.0", "1" + "0" * 400)),
            (HEADER, "BIN ***"),
            (HEADERS[2], "////"),
            (HEADER, "TEXT a=1," * LENGTH_MAX),
        ],
    )
    def test_broken(self, name: str, value: str) -> None:
        """A broken report is no report, whole or in part."""
        assert read_report({name: value}) is None

    @given(st.sampled_from(HEADERS), st.sampled_from(["", "TEXT ", "JSON ", "BIN "]), st.text())
    def test_garbage(self, name: str, kind: str, text: str) -> None:
        """No text whatever makes it fail."""
        read_report({name: kind + text})
