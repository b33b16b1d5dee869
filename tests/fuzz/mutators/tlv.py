"""DER as a tree: mutations that keep every length true, so that a change deep inside is not refused at the door."""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.fuzz.mutators import parts
from tests.fuzz.target import Mutate

CONSTRUCTED = 0x20
EXTENSIONS = 0xA3
MOST_NODES = 400


class Node(NamedTuple):
    """One element: where it starts, where its content starts, where it ends, and in which node it lies (-1: none)."""

    start: int
    content: int
    end: int
    parent: int


def nodes(data: bytes) -> list[Node]:
    """List the elements of well-formed DER, parents before children; what is malformed is left alone."""
    found: list[Node] = []

    def walk(at: int, end: int, parent: int) -> None:
        while at + 2 <= end and len(found) < MOST_NODES:
            size, content = data[at + 1], at + 2
            if size & 0x80:
                count = size & 0x7F
                content += count
                if not 1 <= count <= 3 or content > end:
                    return
                size = int.from_bytes(data[at + 2 : content], "big")
            if content + size > end:
                return
            found.append(Node(at, content, content + size, parent))
            if data[at] & CONSTRUCTED:
                walk(content, content + size, len(found) - 1)
            at = content + size

    walk(0, len(data), -1)
    return found


def element(tag: int, content: bytes) -> bytes:
    """Write one element."""
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


def replaced(data: bytes, tree: list[Node], index: int, new: bytes) -> bytes:
    """Put ``new`` in an element's place and make the lengths of all that hold it true again."""
    while index >= 0:
        node = tree[index]
        up = node.parent
        if up < 0:
            return data[: node.start] + new + data[node.end :]
        holder = tree[up]
        content = data[holder.content : node.start] + new + data[node.end : holder.end]
        new, index = element(data[holder.start], content), up
    return data


def mutate(data: bytes, limit: int, chance: random.Random, engine: Mutate) -> bytes:
    """Change, drop, double or move one element, or its tag; now and then, any bytes."""
    tree = nodes(data)
    if not tree or chance.random() < 0.15:
        return engine(data, limit)
    index = chance.randrange(len(tree))
    node = tree[index]
    tag, content = data[node.start], data[node.content : node.end]
    whole = data[node.start : node.end]
    match chance.randrange(8):
        case 0:
            new = b""
        case 1:
            new = whole * chance.choice((2, 2, 2, 30))
        case 2:
            other = tree[chance.randrange(len(tree))]
            new = data[other.start : other.end]
        case 3:
            new = element(
                chance.choice((0x02, 0x03, 0x04, 0x05, 0x06, 0x0C, 0x13, 0x16, 0x17, 0x18, 0x30)), content
            )
        case 4:
            new = element(tag, parts.number(chance, max(1, min(len(content), 80))))
        case _:
            new = element(tag, parts.part(content, max(1, limit // 2), chance, engine))
    return replaced(data, tree, index, new)[:limit]


def with_extensions(certificate: bytes, size: int) -> bytes:
    """Give a certificate of about ``size`` bytes, all that was added being extensions of different names."""
    tree = nodes(certificate)
    index = next(i for i, node in enumerate(tree) if certificate[node.start] == EXTENSIONS)
    listed = tree[index + 1]
    content = certificate[listed.content : listed.end]
    added = 0
    while len(certificate) + added * 13 < size - 40:
        oid = b"\x06\x05\x2b\x06\x01" + bytes([0x81 + (added >> 7), added & 0x7F])
        content += element(0x30, oid + b"\x04\x02\x05\x00")
        added += 1
    return replaced(certificate, tree, index + 1, element(0x30, content))


def with_names(certificate: bytes, size: int) -> bytes:
    """Give a certificate of about ``size`` bytes, all that was added being parts of its subject."""
    tree = nodes(certificate)
    inside = [i for i, node in enumerate(tree) if node.parent == 1 and certificate[node.start] == 0x30]
    subject = inside[3]  # after algorithm, issuer and validity
    content = certificate[tree[subject].content : tree[subject].end]
    one = element(0x31, element(0x30, bytes.fromhex("0603550403") + element(0x0C, b"x")))
    content += one * ((size - len(certificate) - 20) // len(one))
    return replaced(certificate, tree, subject, element(0x30, content))


def nested(size: int) -> bytes:
    """Give SEQUENCEs in SEQUENCEs, ``size`` bytes of them or little less."""
    data = b""
    while len(data) + 4 < size:
        data = element(0x30, data)
    return data
