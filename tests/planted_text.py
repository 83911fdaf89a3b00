"""Bugs in tokenizers, export and generation; `tests/planted.py` says how to read the table."""

TABLE = """
@ a document's special tokens are read | data/tokenizers.py | tokenizers | letters
- inner.encode_special_tokens = True
+ inner.encode_special_tokens = False
@ a prompt's special tokens are letters | data/tokenizers.py | tokenizers | letters
- copy.encode_special_tokens = self._letters
+ copy.encode_special_tokens = True
@ null in a tokenizer's files is a guess | data/tokenizers.py | tokenizers | roles
- elif name in roles:
+ elif roles.get(name):
@ the older file decides about roles | data/tokenizer_files.py | tokenizers | roles
- for file in (config, older) if key in file
+ for file in (older, config) if key in file
@ bos is guessed for a class without one | data/tokenizer_files.py | tokenizers | roles
- roles.setdefault("bos", None)
+ pass
@ one of several ends | data/tokenizer_files.py | tokenizers | ends
- return tuple(ends)
+ return tuple(ends[:1])
@ eos does not end where others do | data/tokenizers.py | tokenizers | ends
- tuple(dict.fromkeys([*files.ends, *own_ends]))
+ files.ends or tuple(own_ends)
@ what stands after a text is put before it | data/tokenizers.py | tokenizers | letters
- return tuple(framed.ids[: framed.special_tokens_mask.index(0)])
+ return tuple(i for i, m in zip(framed.ids, framed.special_tokens_mask) if m)
@ ByT5's bytes begin at 0 | data/tokenizers.py | tokenizers | byt5
- return np.frombuffer(data, np.uint8).astype(np.int32) + self.offset
+ return np.frombuffer(data, np.uint8).astype(np.int32)
@ a prompt that spells its prefix gets two | evals/language.py | evals_language | framed
- if not framed or self.kind != "causal" or tokens[:1] == [self.first]:
+ if not framed or self.kind != "causal":
@ an empty context is the separator for everybody | evals/language.py | evals_language | framed
- if self.framed and "bos" in vocabulary.specials:
+ if "bos" in vocabulary.specials and not vocabulary.specials:
@ a continuation loses its beginning | evals/language.py | evals_language | does_not_fit
- if longest > room:
+ if longest > 10 * room:
@ the nucleus is of all tokens | evals/generation.py | evals_generate | nucleus
- shares = jax.nn.softmax(ordered)
+ shares = jax.nn.softmax(jnp.sort(scores, descending=True).astype(jnp.float32))
@ the nucleus stops before it reaches top_p | evals/generation.py | evals_generate | nucleus
- nucleus = (ordered > -jnp.inf) & ((before < top_p) | (top_p >= 1))
+ nucleus = (ordered > -jnp.inf) & ((before + shares <= top_p) | (top_p >= 1))
@ only eos ends a text | evals/generation.py | evals_generate | any_of_the_ends
- ends = np.flatnonzero(np.isin(tokens, tokenizer.ends))
+ ends = np.flatnonzero(tokens == vocabulary.separator)
@ an exported decoder begins with an untrained token | data/tokenizer_export.py | export | bytes or frame
- roles["bos"] = roles["eos"] = tokenizer.vocabulary.separator
+ roles["eos"] = tokenizer.vocabulary.separator
@ an exported tokenizer keeps a frame that was not trained | data/tokenizer_export.py | export | frame
- inner.post_processor = _frame(kind, roles, spellings)
+ inner.post_processor = _frame(kind, roles, spellings) or inner.post_processor
@ letters of bytes that do not print are themselves | data/tokenizer_export.py | export | of_bytes
- printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
+ printing = {*range(33, 127), *range(161, 256)}
@ another tokenizer's files come with an export | train/export.py | export | keeps_its_files
- if origin is not None and _same(trained, located(origin)):
+ if origin is not None:
@ an export says nothing about the window | train/export.py | export | window
- keys["max_position_embeddings"] = limit
+ pass
@ a strided tensor is written in another order | hf/files.py | hf_files | one_tensor
- np.ascontiguousarray(array).reshape(-1)
+ np.ascontiguousarray(array.T).reshape(-1)
@ narrow tensors come first | hf/files.py | hf_files | one_tensor
- key=lambda item: -item[1].dtype.itemsize
+ key=lambda item: item[1].dtype.itemsize
@ a row of a layer is grown with the share of the first | growth/leafwise.py | bounded | bitwise
- np.asarray(move.share)[number : number + 1]
+ np.asarray(move.share)[:1]
@ layers are read in the order of the old model | growth/leafwise.py | bounded | bitwise
- number = int(move.source[number])
+ number = min(number, int(max(move.source)))
@ draws are cut into layers | growth/leafwise.py | bounded | bitwise
- if plan is None or not plain or slot.origin or not set(_primitives(piece.jaxpr)) <= _ROWWISE:
+ if plan is None or not plain or slot.origin:
@ a short prompt goes along with one beyond LongRoPE | evals/generation.py | evals_generate | read_apart
- far = sum(len(encoded[i]) > switch for i in order)
+ far = len(order)
@ a short prompt is padded to a long one | evals/generation.py | evals_generate | read_apart
- width = max(longest, min(width, switch))
+ pass
@ a text crosses to other positions | evals/generation.py | evals_generate | read_apart
- crossing = [n for n in lengths if n <= switch < n + new - 1]
+ crossing = []
@ tokens beside a vocabulary are not added | data/tokenizer_files.py | tokenizers | found_as_they_say
- if repr(known.get(number)) != repr(token):
+ if False:
@ ids beside a vocabulary are not compared | data/tokenizer_files.py | tokenizers | found_as_they_say
- if inner.token_to_id(given["content"]) != number
+ if False
@ special tokens in a vocabulary are text | data/tokenizer_files.py | tokenizers | without_a_role
- inner.add_special_tokens(words)
+ pass
@ special tokens that a vocabulary lacks are text | data/tokenizers.py | tokenizers | without_a_role
- absent += [repr(token) for token in files.others if token not in ids]
+ pass
@ spellings in prompts are tokens, whatever files say | data/tokenizers.py | tokenizers | letters_too
- copy.encode_special_tokens = self._letters
+ copy.encode_special_tokens = False
@ any class sets BERT's normalizer | data/tokenizer_files.py | tokenizers | class_of_bert
- normalising = _NORMALISING if cls in WORDPIECE - {"", "PreTrainedTokenizer"} else {}
+ normalising = _NORMALISING
@ any class puts a space before a text | data/tokenizer_files.py | tokenizers | class_of_gpt2
- space=config.get("add_prefix_space") if cls in _SPACED else None,
+ space=config.get("add_prefix_space"),
@ words of any class are BERT's | data/tokenizers.py | tokenizers | another_class
- names = (TOKENIZER, WORDS) if class_of(folder) in WORDPIECE else (TOKENIZER,)
+ names = (TOKENIZER, WORDS)
@ a leaf is held whole while it is written | hf/convert.py | bounded | memory
- leaf, rows = leaves[0], row.rows(table)
+ leaves = [np.asarray(x) for x in leaves]
+     leaf, rows = leaves[0], row.rows(table)
@ a part of the outputs is that of the old model | certificate/streaming.py | bounded | part
- after = observed("the grown model", grown)
+ after = before
@ a part has the shares of other units | certificate/part.py | bounded | part
- cut = {name: np.asarray(x)[rows] for name, x in values.items() if x is not None}
+ cut = {name: np.asarray(x)[: len(rows)] for name, x in values.items() if x is not None}
@ rows are padded beyond the positions | evals/language.py | evals_language | beyond_the_positions
- return size if most is None else min(size, most)
+ return size
@ the rows of padding are positions | evals/language.py | evals_language | beyond_the_positions
- rows - padding - 1
+ rows
@ pairs of RoBERTa have one separator | evals/finetune.py | evals_finetune | framed
- [special["sep"]] * (between - 1) + [*part
+ [special["sep"]] * 0 + [*part
"""
