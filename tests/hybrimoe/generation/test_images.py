"""Images in prompts: what the model computes of them is what transformers computes, whole and in parts; texts with
different images have nothing in common; and what is no image is refused with a reason."""

from __future__ import annotations

import base64
import inspect
import io
import json
import struct
import sys
import zlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from seeing_models import FAMILIES_THAT_SEE, PLACEHOLDER, VOCABULARY, picture, write_seeing

import hybrimoe
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.checkpoint.converting import convert
from hybrimoe.checkpoint.meta import meta_model, model_shape
from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import Conversation, SamplingOptions, TextGenerator
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.generation.images.messages import as_json, with_images
from hybrimoe.generation.images.reading import ImageError, ImageFile, from_base64, from_data_url
from hybrimoe.generation.images.tokens import ImageToken, identities, kept, spans, whole_images
from hybrimoe.generation.images.vision import Vision
from hybrimoe.generation.kv_cache import PrefixCache
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.prefix.disk import DiskLevel
from hybrimoe.generation.prefix.keys import name_of
from hybrimoe.generation.saved.sessions import Session

images = pytest.importorskip("PIL.Image")
OPTIONS: dict[str, Any] = {"accelerator": "none", "expert_dtype": "float32", "packed_file": False, "progress": False}
GREEDY = SamplingOptions(max_new_tokens=6, temperature=0)
SHOWN = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
ASKED = "What is it?<|im_end|>\n<|im_start|>assistant\n"
TOLERANCE = 5e-6  # of logits of about 0.4; what is right is off by 3e-7


def file_of(seed: int = 0, kind: str = "PNG", height: int = 32, width: int = 48) -> ImageFile:
    stream = io.BytesIO()
    images.fromarray(picture(height, width, seed)).save(stream, kind)
    return ImageFile(stream.getvalue(), f"picture {seed}")


class Seer:
    """A model that sees, as hybrimoe loads it and as transformers has it."""

    def __init__(self, folder: Path, family: str) -> None:
        self.folder = folder
        self.plain = write_seeing(folder, family)
        self.model = hybrimoe.load(folder, **OPTIONS)
        self.tokenizer = load_tokenizer(folder)
        self.vision = Vision(self.model, self.tokenizer, folder)
        self.generator = TextGenerator(self.model, self.tokenizer, vision=self.vision)

    def encode(self, text: str, *files: ImageFile) -> list[int]:
        return self.vision.encode(text, files, lambda whole: self.tokenizer(whole)["input_ids"])

    def reply(self, ids: list[int], **how: Any) -> list[int]:
        reply = self.generator.reply(ids, GREEDY, **how)
        "".join(reply)
        return reply.token_ids

    def plainly(self, ids: list[int], *files: ImageFile) -> dict[str, torch.Tensor]:
        """The same prompt as transformers takes it."""
        tokens = torch.tensor([[int(token) for token in ids]])
        seen = self.vision._processor.image_processor(
            images=[one.pixels() for one in files], return_tensors="pt"
        )  # fmt: skip
        takes = inspect.signature(self.plain.forward).parameters
        given = {name: value for name, value in seen.items() if name in takes} | {"input_ids": tokens}
        if "mm_token_type_ids" in takes:
            given["mm_token_type_ids"] = (tokens == VOCABULARY[PLACEHOLDER]).int()
        if hasattr(self.vision._processor, "create_moe_mm_token_type_ids"):
            types = self.vision._processor.create_moe_mm_token_type_ids(tokens.tolist())
            given["moe_mm_token_type_ids"] = torch.tensor(types)
        return given


@pytest.fixture(scope="module")
def seers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Seer]:
    made: dict[str, Seer] = {}

    def seer(family: str = "qwen3_vl_moe") -> Seer:
        if family not in made:
            made[family] = Seer(tmp_path_factory.mktemp(family), family)
        return made[family]

    return seer


@pytest.mark.parametrize("family", FAMILIES_THAT_SEE)
def test_logits_and_tokens_are_those_of_transformers(family: str, seers: Callable[[str], Seer]) -> None:
    seer = seers(family)
    first, second = file_of(0), file_of(1, height=40, width=24)
    text = f"{SHOWN}And <|vision_start|><|image_pad|><|vision_end|>{ASKED}"
    ids = seer.encode(text, first, second)
    inputs = seer.plainly(ids, first, second)
    with torch.no_grad():
        expected = seer.plain(**inputs).logits[0, -1]
        without = seer.plain(inputs["input_ids"]).logits[0, -1]
        tokens = seer.plain.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
    assert float((expected - without).abs().max()) > 50 * TOLERANCE, "the images count"
    for part in (None, 7, 16):
        cache = PrefixCache(seer.model)
        reply = seer.generator.reply(ids, GREEDY, cache=cache, part_tokens=part)
        reply.begin()
        logits = None
        while logits is None:
            logits = reply.prefill()
        assert float((logits - expected).abs().max()) <= TOLERANCE, part
        assert seer.reply(ids, part_tokens=part) == tokens, part


def test_the_compiled_step_goes_on_behind_images(seers: Callable[[str], Seer]) -> None:
    seer = seers("qwen3_vl_moe")
    step = seer.model.hybrimoe.step
    before = step.n_steps
    seer.reply(seer.encode(SHOWN + ASKED, file_of()))
    assert step.n_steps >= before + 5


def test_a_text_is_answered_as_without_the_tower(seers: Callable[[str], Seer], tmp_path: Path) -> None:
    seer = seers("qwen3_5_moe")
    blind = hybrimoe.load(seer.folder, vision="none", **OPTIONS)
    n_seeing, n_blind = (sum(one.nbytes for one in model.parameters()) for model in (seer.model, blind))
    assert n_blind < n_seeing
    vision = Vision(blind, seer.tokenizer, seer.folder)
    generator = TextGenerator(blind, seer.tokenizer, vision=vision)
    ids = generator.encode("Some words.")
    reply = generator.reply(ids, GREEDY)
    "".join(reply)
    assert reply.token_ids == seer.reply(ids)
    with pytest.raises(PromptError, match="its vision part was left out"):
        vision.look(file_of())
    blind.hybrimoe.session.close()


@pytest.mark.parametrize("dense_dtype", ["auto", "int8"])
def test_a_pack_has_the_vision_part(dense_dtype: str, seers: Callable[[str], Seer], tmp_path: Path) -> None:
    seer = seers("qwen3_5_moe")
    convert(seer.folder, tmp_path / "pack", expert_dtype="float32", dense_dtype=dense_dtype)
    ids = seer.encode(SHOWN + ASKED, file_of())
    rows = []
    for source in (tmp_path / "pack", seer.folder):
        model = hybrimoe.load(source, **OPTIONS | ({"dense_dtype": dense_dtype} if source == seer.folder else {}))
        vision = Vision(model, seer.tokenizer, tmp_path / "pack")
        own = vision.encode(SHOWN + ASKED, [file_of()], lambda whole: seer.tokenizer(whole)["input_ids"])
        assert own == ids
        rows.append(TextGenerator(model, seer.tokenizer).forward(own, PrefixCache(model)))
        model.hybrimoe.session.close()
    assert torch.equal(*rows)
    blind = hybrimoe.load(tmp_path / "pack", vision="none", **OPTIONS)
    blind.hybrimoe.session.close()


def test_a_pack_without_the_vision_part_takes_text(seers: Callable[[str], Seer], tmp_path: Path) -> None:
    seer = seers("qwen3_vl_moe")
    convert(seer.folder, tmp_path / "pack", expert_dtype="float32", vision="none")
    model = hybrimoe.load(tmp_path / "pack", **OPTIONS)
    reason = Vision(model, seer.tokenizer, tmp_path / "pack").reason
    assert reason is not None
    assert "left out" in reason
    model.hybrimoe.session.close()


def test_memory_of_the_tower_is_counted(seers: Callable[[str], Seer]) -> None:
    folder = seers("qwen3_5_moe").folder
    with_tower, without = (meta_model(folder, vision) for vision in ("auto", "none"))
    n_bytes = sum(one.nbytes for one in with_tower.parameters()) - sum(one.nbytes for one in without.parameters())
    assert model_shape(folder).tower_bytes == n_bytes > 0
    assert model_shape(folder, "none").tower_bytes == 0


def test_without_pillow_it_says_what_to_install(seers: Callable[[str], Seer], monkeypatch: pytest.MonkeyPatch) -> None:
    seer = seers("qwen3_vl_moe")
    monkeypatch.setitem(sys.modules, "PIL", None)
    vision = Vision(seer.model, seer.tokenizer, seer.folder)
    with pytest.raises(PromptError, match=r"Pillow is not installed.*hybrimoe\[images\]"):
        vision.look(ImageFile(b"", "nothing"))


def test_a_processor_that_is_code_never_runs_and_nobody_is_asked(
    seers: Callable[[str], Seer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seer = seers("qwen3_vl_moe")
    (tmp_path / "config.json").write_bytes((seer.folder / "config.json").read_bytes())
    (tmp_path / "processing_homemade.py").write_text("raise SystemExit('it ran')")
    settings = {
        "image_processor_type": "Homemade",
        "processor_class": "Qwen3VLProcessor",
        "auto_map": {"AutoImageProcessor": "processing_homemade.Homemade"},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda text="": pytest.fail("it asked"))
    with pytest.raises(ModelError, match=r"image processor of .* is code of its own.*never runs"):
        Vision(seer.model, seer.tokenizer, tmp_path).look(file_of())


@pytest.mark.parametrize(
    "kinds",
    [
        ("Llama4ImageProcessor", "Llama4Processor"), ("MiniMaxM3VLImageProcessor", "MiniMaxM3VLProcessor"),
        ("PixtralImageProcessor", "PixtralProcessor"), ("InklingImageProcessor", "InklingProcessor"),
    ],
    ids=["Llama-4", "MiniMax-M3", "Mistral", "Inkling"],
)  # fmt: skip
def test_processors_that_are_written_for_torchvision_say_so(
    kinds: tuple[str, str], seers: Callable[[str], Seer], tmp_path: Path
) -> None:
    if find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed")
    seer = seers("qwen3_vl_moe")
    (tmp_path / "config.json").write_bytes((seer.folder / "config.json").read_bytes())
    settings = {"image_processor_type": kinds[0], "processor_class": kinds[1]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    vision = Vision(seer.model, seer.tokenizer, tmp_path)
    wanted = (
        r"needs torchvision, which is not installed: install the release .* torch 2\.\d.*'torchvision==0\.\d\d\.\*'"
    )
    with pytest.raises(ModelError, match=wanted):
        vision.look(file_of())


# What texts with images have in common -------------------------------------------------------------------------------


def test_placeholders_are_equal_for_the_same_picture_only(seers: Callable[[str], Seer]) -> None:
    seer = seers("qwen3_vl_moe")
    one, same, other = (seer.encode(SHOWN + ASKED, file_of(seed)) for seed in (0, 0, 1))
    assert one == same != other
    assert [int(token) for token in one] == [int(token) for token in other]
    assert one != [int(token) for token in one]
    assert len({tuple(one), tuple(same), tuple(other)}) == 2
    assert identities(one) == identities(same) != identities(other)
    blocks = [name_of("block", b"", ids) for ids in (one, same, other, [int(token) for token in one])]
    assert len(set(blocks)) == 3
    assert kept(one) == one
    assert all(token.features is None for token in kept(one) if isinstance(token, ImageToken))
    (span,) = spans(one)
    assert span.n_tokens == span.picture.n_tokens == 24
    assert whole_images(one[: span.end - 1]) == one[: span.start]


def test_another_picture_in_the_same_place_is_no_hit(seers: Callable[[str], Seer]) -> None:
    seer = seers("qwen3_vl_moe")
    tree = PrefixTree(seer.model, 64 << 20)
    answers = []
    for seed in (0, 1, 0):
        ids = seer.encode(SHOWN + "Tell me all about what is here, and more. " * 3 + ASKED, file_of(seed))
        reply = seer.generator.reply(ids, GREEDY, cache=PrefixCache(seer.model, tree))
        "".join(reply)
        answers.append((reply.n_reused, reply.token_ids))
        assert reply.token_ids == seer.reply(ids)
    before = next(spans(ids)).start
    assert [n for n, _ in answers] == [0, before, len(ids)]


def test_pictures_are_told_apart_on_disk(seers: Callable[[str], Seer], tmp_path: Path) -> None:
    seer = seers("qwen3_vl_moe")
    text = SHOWN + "Tell me all about what is here, and more. " * 3 + ASKED
    read = []
    for seed in (0, 0, 1):
        ids = seer.encode(text, file_of(seed))
        tree = PrefixTree(seer.model, 64 << 20, DiskLevel(tmp_path, 1 << 30, "seer"))
        reply = seer.generator.reply(ids, GREEDY, cache=PrefixCache(seer.model, tree))
        "".join(reply)
        read.append(reply.n_read)
        assert reply.token_ids == seer.reply(ids)
        assert tree.disk is not None
        assert tree.disk.n_damaged == 0
        tree.close(10)
    assert read[0] == 0
    assert read[1] >= 64, "a picture and the text behind it"
    assert read[2] == 0, "blocks with parts of images are found by their names alone"


def test_a_beginning_that_ends_within_a_picture(seers: Callable[[str], Seer]) -> None:
    """Positions go on where they were, wherever the cache is cut."""
    seer = seers("qwen3_vl_moe")
    ids = seer.encode(SHOWN + ASKED, file_of())
    expected = seer.generator.forward(ids, PrefixCache(seer.model))
    (span,) = spans(ids)
    for n_kept in (span.start, span.start + 5, span.end - 1, span.end, span.end + 2):
        cache = PrefixCache(seer.model)
        seer.generator.forward(ids[: span.end + 4], cache)
        assert cache.reuse([*ids[:n_kept], 1]) == n_kept
        logits = seer.generator.forward(ids[n_kept:], cache)
        assert float((logits - expected).abs().max()) <= TOLERANCE, n_kept


def test_replies_with_and_without_pictures_side_by_side(seers: Callable[[str], Seer]) -> None:
    seer = seers("qwen3_vl_moe")
    prompts = [
        seer.encode(SHOWN + ASKED, file_of(0)), seer.generator.encode("Only words."),
        seer.encode(SHOWN + ASKED, file_of(1, height=16)),
    ]  # fmt: skip
    engine = BatchEngine(seer.generator, parallel=3, part_tokens=16)
    replies = [engine.admit(ids, GREEDY, lambda: False) for ids in prompts]
    while engine.n_running:
        assert not [progress.error for progress in engine.step() if progress.error]
    assert engine.in_turn is None
    assert [reply.token_ids for reply in replies] == [seer.reply(ids) for ids in prompts]


def test_a_chat_about_a_picture(seers: Callable[[str], Seer], tmp_path: Path) -> None:
    seer = seers("qwen3_vl_moe")
    chat = Conversation(seer.generator)
    n_computed = seer.vision.n_computed
    first = chat.send("What?", GREEDY, images=[file_of(5)])
    "".join(first)
    second = chat.send("And now?", GREEDY)
    "".join(second)
    assert second.reply.n_reused >= len(first.reply.prompt_ids) - 1
    assert seer.vision.n_computed == n_computed + 1, "a picture goes through the tower once"
    session = Session(tmp_path, "one")
    session.save_text(chat)
    session.save_states(chat)
    again = Conversation(seer.generator)
    assert session.restore(again) == "no states were saved"
    assert again.messages == chat.messages or as_json(again.messages) == as_json(chat.messages)
    third = again.send("And now?", GREEDY, instead=True)
    "".join(third)
    assert third.reply.token_ids == second.reply.token_ids
    assert again.undo() == "And now?"
    assert again.last_message == "What?"


def test_the_prompt_has_a_place_for_each_picture(seers: Callable[[str], Seer]) -> None:
    seer = seers("qwen3_vl_moe")
    with pytest.raises(PromptError, match="1 times the model's placeholder"):
        seer.encode(SHOWN + ASKED, file_of(), file_of())
    with pytest.raises(PromptError, match="leave the model's own placeholders out"):
        seer.vision.encode(SHOWN + ASKED, [file_of()], lambda text: seer.tokenizer(text + PLACEHOLDER)["input_ids"])
    with pytest.raises(PromptError, match="at most 64"):
        seer.encode(ASKED, *[file_of()] * 65)


def test_templates_that_know_no_parts(seers: Callable[[str], Seer], monkeypatch: pytest.MonkeyPatch) -> None:
    seer = seers("qwen3_vl_moe")
    chat = Conversation(seer.generator)
    messages = [{"role": "user", "content": with_images("What?", [file_of()])}]
    monkeypatch.setattr(seer.tokenizer, "chat_template", None)
    ids = chat.encode(messages)
    assert next(spans(ids)).n_tokens == 24


# What is no image ----------------------------------------------------------------------------------------------------


def png_of_size(width: int, height: int) -> bytes:
    """A PNG file of some bytes that says it is so large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no image that can be read"),
        (b"GIF89a", "no image that can be read|damaged"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no image that can be read"),
        (file_of().data[:-300], "damaged"),
        (png_of_size(8_000, 8_000), "too many pixels"),
        (png_of_size(60_000, 60_000), "too many pixels"),
        (png_of_size(3, 1_000), "one at most 200 times"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ImageError, match=rf"that one.*({reason})"):
        ImageFile(data, "that one").pixels()


def test_kinds_of_files() -> None:
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        one = file_of(kind=kind)
        assert one.pixels().mode == "RGB"
        assert one.pixels().size == (48, 32)
        assert from_data_url(one.data_url(), "it").data == one.data


def test_base64_and_urls() -> None:
    text = base64.b64encode(file_of().data).decode()
    assert from_base64(f"{text[:40]}\n{text[40:]}", "it").data == file_of().data
    for wrong in ("", "not base64!", text[:-3] + "=="):
        with pytest.raises(ImageError, match=r"it: expected an image in base64"):
            from_base64(wrong, "it")
    with pytest.raises(ImageError, match="at most 20 MiB"):
        from_base64("A" * (28 << 20), "it")
    for url in ("https://example.org/cat.png", "file:///etc/passwd", "cat.png"):
        with pytest.raises(ImageError, match="not fetched from elsewhere"):
            from_data_url(url, "it")
    with pytest.raises(ImageError, match=r"expected a data: URL in base64"):
        from_data_url("data:image/png,abc", "it")
