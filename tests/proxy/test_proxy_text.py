"""Prompts as text chains, what the proxy learns of their tokens, and how both meet the exact index."""

from __future__ import annotations

from typing import Any

import msgspec
from dynamo_proxy.knowledge import SPECULATION_SECONDS, Knowledge
from dynamo_proxy.kv_events import decode_batch
from dynamo_proxy.text_chain import UNIT_BYTES, chain_units, node_units, read_prompt, text_chain
from dynamo_proxy.token_memo import TokenMemo
from hypothesis import given
from hypothesis import strategies as st

LONG = "The quick brown fox jumps over the lazy dog. " * 40


def turn(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"model": "m", "messages": messages, **fields}


def test_a_later_turn_continues_the_chain_of_an_earlier_one() -> None:
    first, second = read_prompt(turn(LONG)), read_prompt(turn(LONG, "sure", "and?"))
    whole_blocks = len(first.text) // 256
    assert second.chain[:whole_blocks] == first.chain[:whole_blocks]
    assert second.chain[whole_blocks] != first.chain[whole_blocks]


def test_model_salt_and_tools_separate_chains() -> None:
    plain = read_prompt(turn(LONG)).chain[0]
    others = [
        read_prompt(turn(LONG, model="n")).chain[0],
        read_prompt(turn(LONG, cache_salt="s")).chain[0],
        read_prompt(turn(LONG, tools=[{"type": "function"}])).chain[0],
        read_prompt(turn(LONG), frozenset(["m"])).chain[0],
    ]
    assert len({plain, *others}) == 5


def test_text_parts_read_as_their_text_and_every_route_has_a_prompt() -> None:
    content = [{"type": "text", "text": "hi"}]
    parts = read_prompt({"model": "m", "messages": [{"role": "user", "content": content}]})
    assert parts.chain == read_prompt(turn("hi")).chain
    assert read_prompt({"prompt": [1, 2, 3]}).token_ids == (1, 2, 3)
    assert read_prompt({"prompt": [[4, 5], [6]]}).token_ids == (4, 5)
    assert read_prompt({"input_ids": [1, 2]}).token_ids == (1, 2)
    assert read_prompt({"text": "abc"}).text == b"abc"
    assert read_prompt({"input": ["abc", "d"]}).text == b"abc"
    assert read_prompt({"input": [{"role": "user", "content": "abc"}], "instructions": "be"}).chain
    image = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "u"}}], "tool_calls": [1]}
    assert read_prompt({"messages": [image, "odd", 5]}).chain


@given(st.binary(max_size=9000), st.integers(0, 9000))
def test_texts_share_the_nodes_that_lie_in_their_common_prefix(text: bytes, cut: int) -> None:
    chain, other = text_chain(text, 7), text_chain(text[:cut] + b"#" + text[cut:], 7)
    same = next((depth for depth, pair in enumerate(zip(chain, other, strict=False)) if pair[0] != pair[1]), len(chain))
    assert set(chain[same:]).isdisjoint(other)
    if cut < len(text):
        assert chain_units(same) * UNIT_BYTES <= cut or text[cut:] == b"#" * len(text[cut:])
    assert chain_units(len(chain)) == sum(map(node_units, chain)) >= len(text) / UNIT_BYTES


words = st.sampled_from(["", "role", "content", "text", "type", "user", "é", "\0"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
)


@given(
    st.dictionaries(
        st.sampled_from(["model", "messages", "prompt", "input", "text", "input_ids", "tools"]), json_values
    )
)
def test_any_json_object_gives_a_prompt(body: dict[str, Any]) -> None:
    prompt = read_prompt(body)
    assert not (prompt.token_ids and prompt.chain)


def test_the_memo_credits_prefixes_proportionally_and_stays_bounded() -> None:
    memo = TokenMemo(max_nodes=10)
    prompt = read_prompt({"prompt": "x" * 1000})
    memo.learn(prompt.chain, 1000, list(range(500)), prompt.root)
    recalled = memo.recall(prompt.chain)
    assert recalled is not None
    assert recalled[1:] == (500, 4)
    shared = memo.recall([*prompt.chain[:2], 1, 2, 3])
    assert shared is not None
    assert shared[1:] == (256, 2)
    for number in range(20):
        other = read_prompt({"prompt": str(number) * 600})
        memo.learn(other.chain, len(other.text), [1, 2, 3], 0)
        memo.check()
    assert memo.recall(prompt.chain) is None


def feed(knowledge: Knowledge, slot: int, tokens: list[int], size: int = 16) -> None:
    whole = len(tokens) // size * size
    event = ["BlockStored", list(range(whole // size)), None, tokens[:whole], size, None, "GPU"]
    for decoded in decode_batch(msgspec.msgpack.encode([0.0, [event]]))[0]:
        knowledge.exact.apply(slot, 0, decoded)
    knowledge.event_mask |= 1 << slot
    knowledge.exact_mask |= 1 << slot


def test_token_prompts_meet_the_exact_index_directly() -> None:
    knowledge = Knowledge()
    tokens = list(range(100))
    feed(knowledge, 1, tokens)
    prompt = read_prompt({"prompt": [*tokens, 7, 8]})
    assert knowledge.matched_tokens(prompt, 0b11, 0.0) == {1: 96}
    assert knowledge.prompt_tokens(prompt) == 102
    knowledge.check()


def test_a_text_prompt_meets_the_exact_index_once_its_tokens_are_known() -> None:
    knowledge = Knowledge()
    prompt = read_prompt({"prompt": LONG})
    tokens = [ord(letter) for letter in LONG]
    feed(knowledge, 0, tokens)
    assert knowledge.matched_tokens(prompt, 1, 0.0) == {0: 0}
    knowledge.memo.learn(prompt.chain, len(prompt.text), tokens, prompt.root)
    knowledge.memo.tokens_per_byte = 1.0
    assert knowledge.matched_tokens(prompt, 1, 0.0)[0] == len(tokens) // 16 * 16
    longer = read_prompt({"prompt": LONG + "and more of it " * 100})
    shared = knowledge.matched_tokens(longer, 1, 0.0)[0]
    assert len(tokens) - 300 < shared <= len(tokens)
    knowledge.check()


def test_events_overrule_what_was_sent_except_a_moment_ago() -> None:
    knowledge = Knowledge()
    prompt = read_prompt({"prompt": LONG})
    tokens = [ord(letter) for letter in LONG]
    knowledge.memo.learn(prompt.chain, len(prompt.text), tokens, prompt.root)
    knowledge.memo.tokens_per_byte = 1.0
    feed(knowledge, 0, [9] * 32)  # the engine holds something else
    knowledge.sent(0, prompt, 100.0)
    assert knowledge.matched_tokens(prompt, 1, 101.0)[0] > 1000
    assert knowledge.matched_tokens(prompt, 1, 101.0 + SPECULATION_SECONDS)[0] == 0
    knowledge.exact_mask = 0  # events no longer whole: what was sent counts again
    assert knowledge.matched_tokens(prompt, 1, 999.0)[0] > 1000
    knowledge.forget(0)
    assert knowledge.matched_tokens(prompt, 1, 999.0) == {}
    knowledge.check()
