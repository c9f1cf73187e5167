"""Ways to damage a file: its bytes, its JSON values, its lines of YAML."""

import json
import random
import re

HUGE, DEEP = 10**400, 2000
# Values that readers do not expect, put in place of any value of a JSON document.
ODD = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**70), 0.5, 1e308, -1e308),
    *("", " ", "\0", "\ud800", "a\udfff", "\ufeff", "../../x", "/etc/passwd", "x" * 300, "1", "²"),
    *("nan", "[1", '{"a": 1, "a": 2}', '[{"role": "user"}]', "\n", "\u2028", "%s{}", "\x1b[2J"),
    *([], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"a": {"a": 1}}}, ["a"] * 3),
]
_TOKENS = [
    *(b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"\r", b'"', b"\\"),
    *(b"{", b"}", b"[", b"]", b",", b":", b"null", b"NaN", b"Infinity", b"-", b"1e999", b"\\ud800"),
    *(b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"../", b"'", b"&a ", b"*a ", b"<<: *a\n"),
    *(b"!!python/object:os.system ", b"!!int ", b"!!float x", b"? ", b"- ", b"\t", b"2024-13-45"),
    *(
        b"!!binary ",
        b"!!set ",
        b"0b_",
        b"1:30",
        b"---\n",
        b"%TAG ! x\n",
        b"\xe2\x80\xa8",
        b"#",
        b"|",
    ),
]
_YAML = re.compile(rb"^[\w ]+:", re.MULTILINE)


def mutated(content: bytes, rng: random.Random) -> bytes:
    """The content with one to four faults; now and then as it is."""
    if rng.random() < 0.02:
        return content
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        ways = [_bytes]
        if content[:1] in (b"{", b"["):
            ways += [_json, _json, _json, _json_text]
        elif _YAML.match(content):
            ways += [_yaml, _yaml]
        if content[:1] not in (b"{", b"[") and len(content) > 8 and content[8:9] == b"{":
            ways += [_safetensors]
        content = rng.choice(ways)(content, rng)
    return content


def _bytes(content: bytes, rng: random.Random) -> bytes:
    at, end = sorted(rng.randint(0, len(content)) for _ in range(2))
    end = min(end, at + rng.choice((1, 1, 8, 64, 100_000)))
    token = rng.choice(_TOKENS)
    return rng.choice(
        (
            lambda: content[:at] + token + content[at:],
            lambda: content[:at] + token + content[end:],
            lambda: content[:at] + content[end:],
            lambda: content[:at],
            lambda: content[:end] + content[at:end] + content[end:],
            lambda: content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
            lambda: token + content,
            lambda: content + token,
            lambda: content.decode("utf-8", "replace").encode("utf-16"),
            lambda: b"",
            lambda: (
                b"\n".join(rng.sample(lines, len(lines)))
                if len(lines := content.split(b"\n")) < 200
                else content
            ),
        )
    )()


def _json(content: bytes, rng: random.Random) -> bytes:
    """One value of a JSON document, or of a line of one, changed, removed or moved."""
    lines = content.split(b"\n")
    is_lines = len([line for line in lines if line]) > 1 and lines[0][-1:] == b"}"
    index = rng.randrange(max(1, len(lines) - 1)) if is_lines else 0
    text = lines[index] if is_lines else content
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return _bytes(content, rng)
    value = _changed(value, rng)
    try:
        text = json.dumps(value).encode()
    except (ValueError, RecursionError):
        text = b"[" * DEEP + b"]" * DEEP
    if not is_lines:
        return text
    return b"\n".join([*lines[:index], text, *lines[index + 1 :]])


def _changed(value, rng: random.Random):
    places = list(_places(value))
    if not places:
        return rng.choice(ODD)
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if way == 0:
        del holder[key]
    elif way == 1 and isinstance(holder, dict):
        holder[rng.choice((key.upper(), "", "\ud800", "../x", key + " "))] = holder.pop(key)
    elif way == 2:
        holder[key] = [holder[key]]
    elif way == 3:
        holder[key] = {"a": holder[key]}
    elif way == 4:
        for _ in range(rng.choice((30, 99, 150, 900))):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    elif way == 5:
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at]))
    elif way == 6 and isinstance(holder[key], str):
        holder[key] = rng.choice((holder[key] * 50, holder[key][:1], json.dumps(holder[key])))
    else:
        holder[key] = rng.choice((*ODD, HUGE))
    return value


def _places(value):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, child in list(items):
            yield value, key
            if isinstance(child, dict | list):
                yield from _places(child)


def _json_text(content: bytes, rng: random.Random) -> bytes:
    """What only the text can hold: a key twice, a number out of range, NaN."""
    keys = list(re.finditer(rb'"[^"]*": ', content[:20_000]))
    if not keys:
        return _bytes(content, rng)
    key = rng.choice(keys)
    value = rng.choice((b"1", b'"x"', b"null", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[]"))
    if rng.random() < 0.6:
        return content[: key.start()] + key[0] + value + b", " + content[key.start() :]
    return content[: key.end()] + value + b', "z": ' + content[key.end() :]


def _yaml(content: bytes, rng: random.Random) -> bytes:
    lines = content.split(b"\n")
    at = rng.randrange(len(lines))
    key, colon, value = lines[at].partition(b":")
    odd = rng.choice(
        (
            *(b"null", b"true", b"no", b"1" + b"0" * 400, b"0x" + b"f" * 9000, b"-1", b"1e400"),
            *(b"[" * 150 + b"]" * 150, b"{a: 1, a: 2}", b"!!bool x", b"!!float abc", b"!!int 0b_"),
            *(b"2024-13-45", b"2024-01-01", b"&a {b: *a}", b"&a [*a, *a]", b"*none", b"!!binary x"),
            *(b"!!python/name:os.system", b"|\n  text", b"{<<: {x: 1}, y: 2}", b"{<<: 3}", b"? a"),
            *(b"[a, b]", b"{}", b'"\\0"', b'"\\ud800"', b"../../x", b"{1: 2}", b"{[a]: 2}", b"''"),
            *(b".inf", b".nan", b"{path: x, split: 3}", b"[{path: x, weight: -1}, null]", b"x: y"),
        )
    )
    levels = b"\n".join(
        b"  %c: &%c [%s]" % (c, c, b", ".join([b"*%c" % (c - 1)] * 9)) for c in range(98, 112)
    )
    return b"\n".join(
        rng.choice(
            (
                lambda: [*lines[:at], key + b": " + odd, *lines[at + 1 :]],
                lambda: [*lines[:at], key + b": " + odd, *lines[at + 1 :]],
                lambda: [*lines, lines[at]],
                lambda: [*lines[:at], b"  " + lines[at], *lines[at + 1 :]],
                lambda: [*lines, odd],
                lambda: [*lines, b"model_init_kwargs:\n  a: &a [x]\n" + levels],
                lambda: [*lines[:at], key.upper() + colon + value, *lines[at + 1 :]],
            )
        )()
    )


def _safetensors(content: bytes, rng: random.Random) -> bytes:
    """A change of the header, its length put right."""
    size = int.from_bytes(content[:8], "little")
    header = _json(content[8 : 8 + size], rng)
    return len(header).to_bytes(8, "little") + header + content[8 + size :]
