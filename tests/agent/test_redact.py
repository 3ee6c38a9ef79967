"""No planted secret leaves the node, wherever it stands and however it is cut; nothing else is touched."""

from __future__ import annotations

import logging
import os
import random
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from skyrl_otel.agent.batch import build
from skyrl_otel.agent.redact import RULES, Redactor, from_settings
from skyrl_otel.agent.writer import Writer
from skyrl_otel.capture.levels import Levels
from skyrl_otel.capture.records import Records
from skyrl_otel.capture.taker import make_take
from skyrl_otel.spool import layout, settings
from skyrl_otel.spool.writer import WriterFolder
from tests.receiver import decode

ROOT = Path(__file__).resolve().parents[2]
LETTERS = string.ascii_letters + string.digits
chance = random.Random(7)


def chars(count: int, alphabet: str = LETTERS) -> str:
    return "".join(chance.choice(alphabet) for _ in range(count))


def secrets_of(rule: str) -> tuple[str, str]:
    """(text in which a secret stands, the secret)."""
    if rule == "huggingface":
        token = "hf_" + chars(34)
        return chance.choice(["{}", "token={}", "login with '{}' ok", "HF_TOKEN={};"]).format(token), token
    if rule == "openai":
        token = chance.choice(["sk-" + chars(48), "sk-proj-" + chars(60, LETTERS + "-_"), "sk-ant-" + chars(40)])
        return f"OPENAI_API_KEY={token}", token
    if rule == "aws-key-id":
        token = chance.choice(["AKIA", "ASIA"]) + chars(16, string.ascii_uppercase + "234567")
        return f"aws_access_key_id = {token}", token
    if rule == "aws-secret":
        token = chars(40, LETTERS + "/+")
        return chance.choice(
            ["aws_secret_access_key = {}", "AWS_SECRET_ACCESS_KEY={}", '"secretAccessKey": "{}"']
        ).format(token), token
    if rule == "wandb":
        token = chars(40, "0123456789abcdef")
        return chance.choice(["WANDB_API_KEY={}", "wandb login {}", "wandb_api_key: {}"]).format(token), token
    if rule == "bearer":
        token = chars(50, LETTERS + "-._") + "7"
        return chance.choice(["Authorization: Bearer {}", "'authorization': 'bearer {}'"]).format(token), token
    token = chars(20)
    return f"https://user:{token}@example.com/path", token


def test_each_rule_masks_its_own_and_keeps_the_length() -> None:
    for rule in RULES:
        redactor = Redactor()
        for _ in range(20):
            text, secret = secrets_of(rule.name)
            masked = redactor.text(f"before {text} after".encode())
            assert secret.encode() not in masked and len(masked) == len(f"before {text} after".encode())
            assert masked.startswith(b"before ") and masked.endswith(b" after")
        assert redactor.hits[rule.name] == 20


INNOCENT = """
task-1234567890123456789012345678901234567890 risk-free sk-learn disk-usage-of-the-node-is-low-enough-for-training
Fetching https://huggingface.co/meta/llama@main and git@github.com:a/b.git http://0.0.0.0:8000/v1 user@host
bearer of bad news; the bearer authentication-token-provider is ready
hf_transfer hf_hub_download hf_xet AKIA ASIAN wandb: Syncing run; wandb login first; WANDB_API_KEY is not set
step 7 commit 0123456789abcdef0123456789abcdef01234567 secret_access_key is missing
""".strip().splitlines()


def test_what_only_looks_like_one_stays() -> None:
    redactor = Redactor()
    for line in INNOCENT:
        assert redactor.text(line.encode()) == line.encode()
    assert not redactor.hits


def test_no_false_alarm_on_the_recorded_samples() -> None:
    redactor = Redactor()
    files = [path for path in (ROOT / "tests" / "data").rglob("*") if path.is_file()]
    for path in files:
        data = path.read_bytes()
        assert redactor.text(data) == data, path


class Sent:
    """Everything an agent would have sent of one writer."""

    def __init__(self, root: Path, **facts: Any) -> None:
        self.folder = WriterFolder.create(layout.open_run(root, "run"), facts=facts)
        self.redactor = Redactor()
        self.agent = Writer("run", self.folder.writer_id, self.folder.path, redactor=self.redactor)
        self.bodies = b""
        self.texts: list[str] = []
        self.now = 10**12

    def look(self, rounds: int = 1, budget: int = 1 << 20) -> None:
        for _ in range(rounds):
            self.now += 2_000_000_000
            self.agent.observe(self.now)
            batch = build([self.agent], budget)
            self.bodies += batch.body
            self.texts += [record.body for record in decode(batch.body) if not record.event]
            batch.accept()
            self.agent.write_checkpoint()


def test_invariant_7_planted_secrets_do_not_leave(spool_root: Path) -> None:
    sent = Sent(spool_root, role="r", user_attributes={"note": secrets_of("huggingface")[0]})
    records = Records(lambda: None)
    records.use(sent.folder)
    take = make_take(records, Levels({}))
    planted = []
    for rule in RULES:
        for number in range(20):
            text, secret = secrets_of(rule.name)
            planted.append((rule.name, secret))
            os.write(sent.folder.fds["out"], b"filler %s\n" % chars(chance.randrange(2000)).encode())
            os.write(sent.folder.fds["out"], f"x {text}\n".encode())
            record = logging.LogRecord("a", 20, "p", number, "said %s", (text,), None, "f")
            record.__dict__.update(key=text, nested={"list": [text, 1], "raw": text.encode()})
            assert take(record)
    sent.look(30, budget=16 << 10)
    assert len(sent.texts) == 3 * len(planted)
    leaked = [(rule, secret) for rule, secret in planted if secret.encode() in sent.bodies]
    assert not leaked
    assert all(sent.redactor.hits[rule.name] >= 20 * 5 for rule in RULES), sent.redactor.hits


def test_secrets_that_are_keys_do_not_leave(spool_root: Path) -> None:
    in_resource = secrets_of("huggingface")[1]
    sent = Sent(spool_root, role="r", user_attributes={in_resource: "note"})
    records = Records(lambda: None)
    records.use(sent.folder)
    take = make_take(records, Levels({}))
    planted = [in_resource]
    for rule in RULES:
        for number in range(20):
            text, secret = secrets_of(rule.name)
            planted.append(secret)
            record = logging.LogRecord("a", 20, "p", number, "m", (), None, "f")
            record.__dict__.update({text: "own", "by_token": {text: "user", "deeper": [{text: {text: 1}}]}})
            assert take(record)
    secret = "hf_" + chars(34)
    planted.append(secret)
    escaped = f'{{"level": "info", "msg": "m", "\\u0068{secret[1:]}": "v", "in": {{"\\u0068{secret[1:]}": 1}}}}\n'
    os.write(sent.folder.fds["out"], escaped.encode())
    sent.look(30)
    assert len(sent.texts) == len(planted) - 1
    assert [secret for secret in planted if secret.encode() in sent.bodies] == []
    assert b"by_token" in sent.bodies and b"user" in sent.bodies


@pytest.mark.parametrize("rule", [rule.name for rule in RULES])
def test_a_secret_cut_by_parts_or_partial_lines_does_not_leave(spool_root: Path, rule: str) -> None:
    sent = Sent(spool_root, role="r")
    planted = []
    for number in range(20):
        text, secret = secrets_of(rule)
        planted.append(secret)
        data = text.encode()
        # Somewhere in the secret, the line is cut: by the longest part, or because its writer pauses.
        at = data.index(secret.encode()) + chance.randrange(1, len(secret))
        if number % 2:
            filler = b" " * ((256 << 10) - at)
            os.write(sent.folder.fds["out"], filler + data + b" end\n")
        else:
            os.write(sent.folder.fds["out"], b"goes on: " + data[:at])
            sent.look(3)
            os.write(sent.folder.fds["out"], data[at:] + b" end\n")
        sent.look(4)
    joined = "".join(sent.texts).encode()
    assert len(sent.texts) >= 40
    for secret in planted:
        for start in range(0, len(secret) - 10, 5):
            assert secret[start : start + 12].encode() not in joined, f"{rule}: {secret} left in part"
    assert joined.count(b" end") == 20


def recognised(secret: str) -> list[bytes]:
    """Lines and events whose format is recognised; some hide the secret until they are read."""
    half = len(secret) // 2
    return [
        f"INFO 11-23 05:35:41 [core.py:402] token {secret}\n".encode(),
        f"(EngineCore pid=7) INFO 11-23 05:35:41 [core.py:402] token {secret}\n".encode(),
        f"WARNING:{secret}:the logger\n".encode(),
        f'level=info logger="{secret}" msg=ok key={secret}\n'.encode(),
        f"Traceback (most recent call last):\n  File 'x'\nValueError: {secret}\n".encode(),
        f"bar  0%| {secret}\rbar 50%| {secret}\n".encode(),
        b'{"level": "info", "msg": "a\\u0020b \\u0%03x%b", "logger": "l\\u0020%b", "key": "\\u0%03x%b", "k": "\\/%b"}\n'
        % (ord(secret[0]), secret[1:].encode(), secret.encode(), ord(secret[0]), secret[1:].encode(), secret.encode()),
        f"x \x1b[1m{secret[:half]}\x1b[0m{secret[half:]}\n".encode(),
        f"ERROR:root:login\nTraceback (most recent call last):\n  wandb login\n  {secret}\nE: x\n".encode(),
    ]


def test_no_record_of_a_recognised_format_gives_a_secret_away(spool_root: Path) -> None:
    sent = Sent(spool_root, role="r")
    planted, lines = [], 0
    for number in range(60):
        secret = "hf_" + chars(34)
        shapes = recognised(secret)
        os.write(sent.folder.fds["out" if number % 2 else "err"], b"".join(shapes) + b"INFO:root:next\n")
        planted.append(secret)
        lines += len(shapes)
        sent.look(1, budget=chance.choice([300, 5000, 1 << 20]))
    sent.look(100)
    assert len(sent.texts) == lines + len(planted), "each is one record"
    assert [secret for secret in planted if secret[3:].encode() in sent.bodies] == []
    key = "0123456789abcdef0123456789abcdef01234567"
    os.write(sent.folder.fds["out"], f"Traceback (most recent call last):\n  wandb login\n  {key}\nE: x\n".encode())
    sent.look(3)
    assert sent.texts[-1].endswith("E: x") and key.encode() not in sent.bodies, "what lines say together"


@given(st.binary(max_size=300), st.lists(st.integers(1, 60), max_size=6))
def test_nothing_changes_its_length_and_masking_twice_changes_nothing(data: bytes, cuts: list[int]) -> None:
    redactor = Redactor()
    masked = redactor.text(data)
    assert len(masked) == len(data) and redactor.text(masked) == masked


def test_the_users_rules_come_from_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("[[redact]]\nname = 'internal'\npattern = 'int-(?P<secret>[0-9]{6})'\nanchors = ['int-']\n")
    redactor = from_settings(settings.read(str(path)).redact)
    assert redactor.text(b"key int-123456.") == b"key int-******."
    path.write_text("[[redact]]\nname = 'bad'\npattern = '('\nanchors = ['x']\n")
    with pytest.raises(settings.SettingsError, match=r"'bad' has pattern='\('"):
        settings.read(str(path))
