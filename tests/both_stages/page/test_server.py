from __future__ import annotations

import base64
import http.client
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from both_stages.page.asked import Asked, Limits
from both_stages.page.models import Gone, Models
from both_stages.sampling import Prompt
from common.config import PROJECT_ROOT, Config
from pipeline import cli
from tests.both_stages.page.conftest import ask, serving

LINE = {"text": "OPEN", "box": [8, 16, 56, 40], "color": "#d01818", "font": "other"}
ASKED: dict[str, Any] = {"caption": "a sign", "lines": [LINE], "models": ["two"], "seed": 7}


def png(**save: Any) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 48, 3), 90, np.uint8)).save(buffer, format="PNG", **save)
    return base64.b64encode(buffer.getvalue()).decode()


def picture(encoded: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(encoded)))


def test_two_models_sample_side_by_side_and_say_what_it_cost(port: int, models: Models) -> None:
    status, answer = ask(port, ASKED | {"models": ["two", "teacher"], "steps": 3, "num_images": 2})
    assert status == 200, answer
    student, teacher = answer["made"]
    assert [(one["model"], one["steps"], one["unet_calls"]) for one in (student, teacher)] == [
        ("two", 2, 2),
        ("teacher", 3, 6),  # a guided step calls twice
    ]
    assert all(len(one["images"]) == 2 and one["seconds"] > 0 for one in (student, teacher))
    shown = picture(student["images"][1])
    assert shown.text["prompt"] == "a sign" and shown.text["image"] == "1"  # type: ignore[attr-defined]
    asked = Prompt(text="a sign", lines=[])
    assert not np.array_equal(np.asarray(shown), models._students["two"].sample(asked, seed=7).pictures[0])


def test_an_image_is_edited_and_read_as_those_of_annotations_are(port: int) -> None:
    status, edited = ask(port, ASKED | {"image": png()})
    assert status == 200, edited
    assert edited["made"][0]["images"] != ask(port, ASKED)[1]["made"][0]["images"]
    for image, said in (
        (base64.b64encode(b"no image").decode(), "image is no JPEG, PNG, WEBP, BMP file"),
        (png()[:60], "image"),
        ("%%%", "no base64"),
    ):
        status, answer = ask(port, ASKED | {"image": image})
        assert status == 400 and said in answer["error"], answer
    chunks = (b"IHDR" + (9000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0", b"IDAT")
    sealed = [
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") for chunk in chunks
    ]
    claims = b"\x89PNG\r\n\x1a\n" + b"".join(sealed)
    status, answer = ask(port, ASKED | {"image": base64.b64encode(claims).decode()})
    assert status == 400 and "image of 9000 x 9000 pixels" in answer["error"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lines": [LINE | {"text": " "}]}, "line 1 has no text"),
        ({"lines": [LINE | {"font": "/etc/passwd"}]}, "line 1: font is '/etc/passwd', expected one of other"),
        ({"lines": [LINE | {"color": "red"}]}, "lines[0]: color is 'red'"),
        ({"lines": [LINE | {"box": [56, 16, 8, 40]}]}, "expected x0 < x1"),
        ({"lines": [LINE | {"box": [1, 2]}]}, "lines.1.box.3: Field required"),
        ({"lines": [LINE | {"text": "咖啡"}]}, "lacks 咖"),
        ({"lines": [LINE] * 31}, "lines: received 31, at most 30"),
        ({"caption": "x" * 4001}, "at most 4000"),
        ({"caption": " ", "lines": []}, "nothing to show"),
        ({"models": ["four"]}, "expected some of two, teacher"),
        ({"models": []}, "models:"),
        ({"num_images": 5}, "images: received 5, at most 4"),
        ({"steps": 101}, "steps: received 101, at most 100"),
        ({"seed": -1}, "seed:"),
        ({"unknown": 1}, "unknown: Extra inputs"),
    ],
)
def test_a_wrong_request_gets_a_message(port: int, change: dict[str, Any], said: str) -> None:
    status, answer = ask(port, ASKED | change)
    assert status == 400
    assert said in answer["error"]


def test_what_is_no_request_of_this_page_is_refused(port: int) -> None:
    assert ask(port, b"{")[0] == 400
    assert ask(port, ASKED, Content_Type="text/plain")[0] == 415  # as a form of another page sends it
    assert ask(port, ASKED, Host="elsewhere.example")[0] == 400  # a name of another page that points here
    status, answer = ask(port, ASKED | {"image": "A" * 200_000})
    assert status == 413 and "choose a smaller image" in answer["error"]


def test_too_many_and_too_long_requests_are_ended(
    config: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, goes_on, sample = threading.Event(), threading.Event(), models.sample

    def held(asked: Asked, check: Callable[[], None]) -> Any:
        begun.set()
        assert goes_on.wait(60)
        return sample(asked, check)

    monkeypatch.setattr(models, "sample", held)
    with serving(config, models, Limits(max_waiting=1, max_seconds=0.01)) as port:
        first: list[Any] = []
        thread = threading.Thread(target=lambda: first.append(ask(port, ASKED)))
        thread.start()
        assert begun.wait(60)
        status, answer = ask(port, ASKED)
        assert status == 503 and "1 requests are waiting already" in answer["error"]
        goes_on.set()
        thread.join()
        assert first[0][0] == 503 and "stopped after 0.01 seconds" in first[0][1]["error"]


def test_a_request_that_does_not_arrive_is_ended(config: Config, models: Models) -> None:
    with serving(config, models, Limits(read_seconds=0.2)) as port:
        slow = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        slow.putrequest("POST", "/sample")
        slow.putheader("Content-Type", "application/json")
        slow.putheader("Content-Length", "100")
        slow.endheaders(b"{")
        assert slow.getresponse().status == 408


def test_what_nobody_waits_for_is_not_sampled_to_its_end(
    config: Config, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[str] = []
    begun, sample = threading.Event(), models.sample

    def watched(asked: Asked, check: Callable[[], None]) -> Any:
        begun.set()
        try:
            return sample(asked, check)
        except Gone:
            ends.append("gone")
            raise

    monkeypatch.setattr(models, "sample", watched)
    long = json.dumps(ASKED | {"models": ["teacher"], "steps": 100, "num_images": 4})
    with serving(config, models, Limits()) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/sample", long, {"Content-Type": "application/json"})
        assert begun.wait(30)
        connection.close()
        assert ask(port, ASKED)[0] == 200  # its turn comes once the other has stopped
    assert ends == ["gone"]


def test_a_bug_ends_the_request_and_not_the_server(
    port: int, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "sample", lambda *_: 1 / 0)
        status, answer = ask(port, ASKED)
        assert status == 500 and "a bug" in answer["error"] and "division" not in answer["error"]
    assert ask(port, ASKED)[0] == 200


def test_the_command_serves_until_a_signal_ends_it(config: Config) -> None:
    assert config.source is not None
    command = [sys.executable, "pipeline.py", "serve", "--config", str(config.source), "--port", "0"]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        port = int(said.split(":")[2].split("/")[0])
        assert said.startswith("http://127.0.0.1:")
        assert ask(port, ASKED | {"lines": [], "models": ["teacher"]})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 75


def test_an_address_that_is_taken_is_a_usage_error(config: Config) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(cli, ["serve", "--config", str(config.source), "--port", port])
    assert result.exit_code == 2
    assert f"--port {port}: Address already in use" in result.output
