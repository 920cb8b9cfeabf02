"""What metrics pages of each engine say, and what they do not."""

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcontrol.simulation.model_server import ModelServerConfig
from flowcontrol_server.sources.engine_metrics import (
    COUNT_MAX,
    LABELS_MAX,
    LINE_BYTES_MAX,
    Engine,
    EngineLoad,
    read_load,
)

PAGES = Path(__file__).parent / "metrics_pages"
"""One page per engine, with the metrics its documentation names among others it also has."""
EXPECTED = {
    "vllm": (Engine.VLLM, EngineLoad(3, 8, kv_usage=0.25, kv_tokens=442_080)),
    "vllm-v0": (Engine.VLLM, EngineLoad(waiting=1, running=2, kv_usage=0.5)),
    "vllm-data-parallel": (Engine.VLLM, EngineLoad(waiting=5, running=12, kv_usage=0.5)),
    "sglang": (Engine.SGLANG, EngineLoad(7, 16, kv_usage=0.28, kv_tokens=454_562)),
    "sglang-all-ranks": (Engine.SGLANG, EngineLoad(waiting=3, running=9, kv_usage=0.25)),
    "tgi": (Engine.TGI, EngineLoad(waiting=4, running=32, kv_usage=None)),
    "triton-trtllm": (Engine.TRITON, EngineLoad(waiting=6, running=10, kv_usage=0.75)),
    "triton-trtllm-old": (Engine.TRITON, EngineLoad(waiting=6, running=10, kv_usage=0.75)),
    "triton": (Engine.TRITON, EngineLoad(waiting=9, running=None, kv_usage=None)),
    "llama.cpp": (Engine.LLAMACPP, EngineLoad(waiting=2, running=4, kv_usage=None)),
    "llama.cpp-old": (Engine.LLAMACPP, EngineLoad(waiting=2, running=4, kv_usage=0.6)),
}
TWO_CORES = (
    '{engine="0",block_size="16",num_gpu_blocks="100"} 1\nvllm:cache_config_info'
    '{engine="1",block_size="16",num_gpu_blocks="50"} 1'
)


def page(name: str) -> bytes:
    """A metrics page."""
    return (PAGES / f"{name}.txt").read_bytes()


class TestEngines:
    """Each engine's own names."""

    @pytest.mark.parametrize("name", EXPECTED)
    def test_page(self, name: str) -> None:
        """The load is read, whether one is told whose page it is or not."""
        engine, expected = EXPECTED[name]

        assert read_load(page(name)) == expected
        assert read_load(page(name), engine) == expected

    @pytest.mark.parametrize(
        ("info", "tokens"),
        [
            ('{block_size="16",num_gpu_blocks="100"} 1', 1600),
            (TWO_CORES, 2400),
            ('{block_size="16",num_gpu_blocks="None"} 1', None),
            ('{num_gpu_blocks="100"} 1', None),
            ('{block_size="-16",num_gpu_blocks="100"} 1', None),
            (f'{{block_size="16",num_gpu_blocks="{"9" * 400}"}} 1', None),
        ],
    )
    def test_blocks_of_vllm(self, info: str, tokens: int | None) -> None:
        """The blocks of all engine cores add up; what is not said is not known."""
        text = f"vllm:num_requests_waiting 0\nvllm:cache_config_info{info}\n"

        load = read_load(text.encode())

        assert load is not None
        assert load.kv_tokens == tokens

    @pytest.mark.parametrize("name", EXPECTED)
    def test_of_another(self, name: str) -> None:
        """A page of another engine than the one expected says nothing."""
        engine = EXPECTED[name][0]

        for other in Engine:
            if other is not engine:
                assert read_load(page(name), other) is None

    def test_every_page_is_used(self) -> None:
        """No page lies about unread."""
        assert {path.stem for path in PAGES.iterdir()} == set(EXPECTED)

    async def test_the_simulated_server(self) -> None:
        """Our own model server speaks as vLLM does."""
        from aiohttp.test_utils import TestClient, TestServer  # noqa: PLC0415 - this test alone

        from flowcontrol_server.tools.model_server import model_application  # noqa: PLC0415 - this test alone

        application = model_application("llama", ModelServerConfig())
        async with TestClient(TestServer(application)) as client, client.get("/metrics") as got:
            assert read_load(await got.read()) == EngineLoad(0, 0, kv_usage=0.0, kv_tokens=32_768)


class TestAbsence:
    """Absence is never zero."""

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "vllm:num_requests_running 8\nvllm:kv_cache_usage_perc 0.5\n",
            "# TYPE vllm:num_requests_waiting gauge\n",
            "vllm:num_requests_waiting\n",
            "vllm:num_requests_waiting NaN\n",
            "vllm:num_requests_waiting +Inf\n",
            "vllm:num_requests_waiting -1\n",
            "vllm:num_requests_waiting many\n",
            f"vllm:num_requests_waiting {COUNT_MAX * 10}\n",
            "xvllm:num_requests_waiting 3\n",
            "  vllm:num_requests_waiting 3\n",
            "vllm:num_requests_waiting_by_reason 3\n",
            "<html>vllm:num_requests_waiting 3</html>",
        ],
    )
    def test_no_queue_no_load(self, text: str) -> None:
        """A page that does not say how many wait says nothing."""
        assert read_load(text.encode()) is None

    def test_the_rest_is_none(self) -> None:
        """What is not said, or cannot be, is None beside what is."""
        assert read_load(b"vllm:num_requests_waiting 3\n") == EngineLoad(3, None, None)
        text = b"vllm:num_requests_waiting 3\nvllm:num_requests_running NaN\n"
        assert read_load(text + b"vllm:kv_cache_usage_perc 40\n") == EngineLoad(3, None, None)

    def test_an_empty_cache_is_not_an_unknown_one(self) -> None:
        """Zero is a number."""
        text = b"vllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc 0.0\n"

        assert read_load(text) == EngineLoad(0, None, 0.0)


class TestFormat:
    """Prometheus's text format, as strictly as need be."""

    @pytest.mark.parametrize(
        "line",
        [
            b"vllm:num_requests_waiting 3",
            b"vllm:num_requests_waiting\t3.0",
            b"vllm:num_requests_waiting{} 3e0",
            b'vllm:num_requests_waiting{model_name="a}b\\"{c"} 3 1700000000000',
            b'vllm:num_requests_waiting{model_name="\xff"} 3\r',
        ],
    )
    def test_lines(self, line: bytes) -> None:
        """Labels, exponents, timestamps and odd bytes do not matter."""
        load = read_load(b"# HELP x y\n" + line + b"\nother 4\n")

        assert load is not None
        assert load.waiting == 3

    @pytest.mark.parametrize(
        "line",
        [
            b'vllm:num_requests_waiting{a="b" 3',
            b"vllm:num_requests_waiting{a=b} 3",
            b'vllm:num_requests_waiting{a="b"c} 3',
            b'vllm:num_requests_waiting{a="b} 3',
            b'vllm:num_requests_waiting{a="b"}3',
            b"vllm:num_requests_waiting " + b"0" * 64 + b"3",
            b"vllm:num_requests_waiting" + b" " * LINE_BYTES_MAX + b"3",
            b"vllm:num_requests_waiting{" + b'a="b",' * (LABELS_MAX + 1) + b"} 3",
        ],
    )
    def test_lines_that_are_not_read(self, line: bytes) -> None:
        """A line with broken labels, or beyond the bounds, says nothing; the next one counts."""
        assert read_load(line) is None
        assert read_load(line + b"\nvllm:num_requests_waiting 4\n") == EngineLoad(4, None, None)

    def test_an_exemplar(self) -> None:
        """What follows the value is not taken for it."""
        line = b'vllm:num_requests_waiting{a="b"} 3 # {trace_id="c"} 0.5'

        assert read_load(line) == EngineLoad(3, None, None)

    @given(st.binary())
    def test_garbage(self, data: bytes) -> None:
        """No bytes whatever make it fail."""
        read_load(data)
        read_load(b"vllm:num_requests_waiting" + data)
        read_load(b"nv_trt_llm_request_metrics{" + data)

    @pytest.mark.parametrize("byte", [b"a", b'a="', b'a="b",', b'a="\\"', b"}", b"} ", b" ", b"{"])
    @pytest.mark.parametrize("size", [8_000, 40_000, 2 * 2**20])
    def test_a_long_line_is_read_in_time(self, byte: bytes, size: int) -> None:
        """A line takes time in proportion to its length: 40 KB of a label took 4.5 s."""
        text = b"vllm:num_requests_waiting{" + byte * (size // len(byte)) + b" 1\n"
        begun_s = time.process_time()
        read_load(text)

        assert time.process_time() - begun_s < 0.5

    @pytest.mark.parametrize(
        "line",
        [b"vllm:num_requests_waiting{", b'a{b="', b"{" * 50, b"vllm:num_requests_waiting 1\n"],
    )
    def test_a_large_page_is_read_in_time(self, line: bytes) -> None:
        """Two megabytes of the worst we know take no time to speak of: nothing is read twice."""
        text = b"\n".join([line * 20] * (2 * 2**20 // (len(line) * 20)))
        begun_s = time.process_time()
        read_load(text)

        assert time.process_time() - begun_s < 1.0
