"""Records -> token ids: the tokenizer, what it puts around documents, and what it makes of chats."""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from read_text import Record, Skip, row_of, text_of, utf8_bytes
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minitrain import chat
from minitrain.chat import ChatTemplate, ConversationError
from minitrain.config import UserError
from minitrain.hf import find_folder

END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>")  # looked for in this order
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Recipe:
    """What becomes of a record."""

    text_field: str = "text"
    chat: bool = False  # records are conversations
    begin_with: tuple[str, ...] = ()  # special tokens before a document
    end_with: tuple[str, ...] | None = None  # behind it; None: end of text, if the tokenizer has it


@dataclass
class Encoded:
    """One record: its documents, or the problem for which it is skipped."""

    documents: list[bytes]  # token ids, as they lie in a shard
    trained: list[bytes]  # of chats, for each document: a byte for each token, 1 where it is to be learnt
    num_bytes: int = 0  # of UTF-8 that became tokens
    problem: str = ""

    @property
    def hash(self) -> bytes:
        """Equal for equal documents, 16 bytes."""
        return hashlib.blake2b(b"".join([*self.documents, *self.trained]), digest_size=16).digest()


class Encoder:
    """A tokenizer, made of the bytes of its files, at work. NOTE ids may have holes: size is the highest plus one."""

    def __init__(self, files: dict[str, bytes], recipe: Recipe):
        self.files, self.recipe = files, recipe
        self.sha256 = hashlib.sha256(files["tokenizer.json"]).hexdigest()
        self.tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        self.tokenizer.encode_special_tokens = not recipe.chat  # text that spells one stays text; templates spell them
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        ids = self.tokenizer.get_vocab()
        self.size = max(ids.values()) + 1
        self.dtype = torch.uint16 if self.size <= 1 << 16 else torch.int32
        config = json.loads(files.get("tokenizer_config.json", b"{}"))
        eos = chat.special_tokens(config).get("eos_token")
        if eos and eos not in ids:
            raise UserError(f"tokenizer_config.json: eos_token {eos!r} is not in tokenizer.json")
        eos = eos or next((token for token in END_OF_TEXT if token in ids), None)
        end_with = recipe.end_with if recipe.end_with is not None else [eos] if eos else []
        if unknown := [token for token in (*recipe.begin_with, *end_with) if token not in ids]:
            raise UserError(f"{unknown[0]!r} is no token of the tokenizer")
        self.begin, self.end = ([ids[token] for token in tokens] for tokens in (recipe.begin_with, end_with))
        jinja = files["chat_template.jinja"].decode() if "chat_template.jinja" in files else None
        source = chat.find_template(config, jinja) if recipe.chat else None
        try:
            self.template = source and ChatTemplate(source, chat.special_tokens(config))
        except UserError as error:  # a file of its own has been read before
            raise UserError(f"tokenizer_config.json: {error}") from None

    def encode(self, records: list[Record]) -> list[Encoded]:
        """UserError, with the record, for a chat template that is no good."""
        return [self._encode_chat(record) for record in records] if self.recipe.chat else self._encode_texts(records)

    def _encode_texts(self, records) -> list[Encoded]:
        """All in one call of the tokenizer, which takes a tenth less time than a call for each."""
        encoded, texts = [], []
        for record in records:
            try:
                text, num_bytes = text_of(record, self.recipe.text_field)
            except Skip as reason:
                encoded.append(Encoded([], [], problem=str(reason)))
            else:
                encoded.append(Encoded([], [], num_bytes))
                texts.append(text)
        ids = iter(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        for e in encoded:
            if e.problem:
                continue
            if tokens := next(ids).ids:
                e.documents.append(self._pack([*self.begin, *tokens, *self.end]))
            else:
                e.num_bytes, e.problem = 0, "empty"
        return encoded

    def _encode_chat(self, record) -> Encoded:
        try:
            return self._encode_conversation(record)
        except (Skip, ConversationError) as reason:
            return Encoded([], [], problem=str(reason))
        except UserError as error:
            raise UserError(f"{error} (in {record})") from None

    def _encode_conversation(self, record) -> Encoded:
        """messages, by the chat template; or prompt and completion, of which the latter is learnt."""
        row = row_of(record)
        if row.get("messages") is not None:  # a table has every column in every row
            if self.template is None:
                raise UserError("the tokenizer has no chat template; give one with --chat-template")
            if not isinstance(tools := row.get("tools") or None, list | None):
                raise Skip("tools that are no list")
            texts = self.template.documents(chat.check_messages(row["messages"]), tools)
            num_bytes = sum(utf8_bytes(text) for text, _ in texts)
            pairs = [chat.encode(self.tokenizer, text, spans) for text, spans in texts]
        else:
            prompt, completion = row.get("prompt"), row.get("completion")
            if not isinstance(prompt, str) or not isinstance(completion, str):
                raise Skip("missing field")
            if not completion:
                raise Skip("empty completion")
            num_bytes = utf8_bytes(prompt) + utf8_bytes(completion)
            encodings = self.tokenizer.encode_batch_fast([prompt, completion], add_special_tokens=False)
            prompt_ids, completion_ids = (encoding.ids for encoding in encodings)
            before, after = [*self.begin, *prompt_ids], [*completion_ids, *self.end]
            pairs = [(before + after, [False] * len(before) + [True] * len(after))]
        if not all(any(trained[1:]) for _, trained in pairs):  # the first token of a document is no target
            raise Skip("an assistant turn without tokens")
        documents = [self._pack(ids) for ids, _ in pairs]
        return Encoded(documents, [bytes(trained) for _, trained in pairs], num_bytes)

    def _pack(self, ids: list[int]) -> bytes:
        return struct.pack(f"{len(ids)}{'H' if self.dtype == torch.uint16 else 'i'}", *ids)  # faster than array()


def load_encoder(source: str | Path, recipe: Recipe, chat_template: str | Path | None = None) -> Encoder:
    """Of tokenizer.json, its folder or a hub id. UserError if there is none or it is no good."""
    path = Path(source)
    if not path.is_file():
        path = find_folder(source, _FILES) / "tokenizer.json"
    if not path.exists():
        raise UserError(f"{path}: no such file")
    beside = path.with_name("chat_template.jinja")
    template = _read_template(beside if chat_template is None and recipe.chat and beside.exists() else chat_template)
    try:
        files = {name: path.with_name(name).read_bytes() for name in _FILES if path.with_name(name).exists()}
        files["tokenizer.json"] = path.read_bytes()  # whatever its name
        return Encoder(files | template, recipe)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # tokenizers raises a plain Exception
        raise UserError(f"{path}: cannot be read as a tokenizer: {error}".splitlines()[0]) from None


def _read_template(path: str | Path | None) -> dict[str, bytes]:
    """The file under the name that it has beside a tokenizer; None: nothing. UserError if it is none."""
    if path is None:
        return {}
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    source = Path(path).read_bytes()
    try:
        ChatTemplate(source.decode())
    except (UserError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None
    return {"chat_template.jinja": source}


def train_encoder(texts: Iterator[str], size: int, recipe: Recipe, chat_template: str | Path | None = None) -> Encoder:
    """Byte-level BPE, so that any text can be encoded, with <|endoftext|>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if size < len(alphabet) + 1:
        raise UserError(f"train_tokenizer={size}: must be at least {len(alphabet) + 1}, all bytes and {END_OF_TEXT[0]}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = {"special_tokens": [END_OF_TEXT[0]], "initial_alphabet": alphabet}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, show_progress=False, **special))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT[0]}
    config["clean_up_tokenization_spaces"] = False  # or transformers 4 drops spaces before punctuation
    files = {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}
    return Encoder(files | _read_template(chat_template), recipe)
