"""Bugs of sources, caches and blends that `python -m tests.mutations` plants; see `tests/planted.py`."""

TABLE = """
@ two bytes of one line's end are two ends | data/files.py | files | one_end_of_a_line or any_form
- rb"(?>\\r\\n|\\r|\\n)"
+ rb"(?:\\r\\n|\\r|\\n)"
@ a separator that ends a chunk is taken at once | data/files.py | files | in_the_next_chunk
- if last == len(rest) and not ended:
+ if False:
@ all that was read is searched again at every chunk | data/files.py | files | looked_at_once
- searched = max(len(rest) - longest, 0)
+ searched = 0
@ a separator across two chunks is missed | data/files.py | files | in_the_next_chunk
- searched = max(len(rest) - longest, 0)
+ searched = len(rest)
@ links in a circle are followed | data/files.py | files | not_in_circles
- if real in around:
+ if len(around) > 30:
@ json lines in a folder are text | data/sources.py | files | by_mistake
- if lines and self.glob == "*" and ".jsonl" not in self.path:
+ if lines and self.glob == "" and ".jsonl" not in self.path:
@ hidden files at URLs are read | data/files.py | files | a_folder_a_file_or_a_pattern
- return [file for file in files.values() if not _hidden(file.name)]
+ return list(files.values())
@ stamps go by the time of modification alone | data/files.py | files | sets_its_time_back
- times = f"{stat.st_mtime_ns} {stat.st_ctime_ns}"
-         return f"{self.name} {stat.st_size} {times} {stat.st_ino}"
+ return f"{self.name} {stat.st_size} {stat.st_mtime_ns}"
@ contents are names without checksums | data/files.py | files | depend_on_the_place
- return f"{file.name} {context.copy().run(file.checksum)}"
+ return file.name
@ half of a character is text | data/sources.py | files | half_of_a_character
- value.encode()
-     except UnicodeEncodeError
+ value.encode(errors="surrogatepass")
+     except UnicodeEncodeError
@ an empty note is a checksum | data/preparation.py | prepare | goes_by_what
- if len(known) == _DIGITS:
+ if True:
@ checksums of files that changed just now are kept | data/preparation.py | prepare | changed_just_now
- if _changed(source) < time.time() - _SETTLED:
+ if _changed(source) < time.time() + 3600:
@ files may change while they are read | data/preparation.py | prepare | change_while
- if not same:
+ if False:
@ documents are written as they are done | data/preparation.py | prepare | in_their_order
- done = waiting.popleft().result()
-                 meter
+ done = waiting.pop().result()
+                 meter
@ one thread tokenises | data/preparation.py | prepare | by_several_threads
- workers = (os.cpu_count() or 1) if getattr(tokenizer, "thread_safe", False) else 1
+ workers = 1
@ any tokenizer is called by several threads | data/preparation.py | prepare | by_several_threads
- if getattr(tokenizer, "thread_safe", False) else 1
+ if True else 1
@ a validation set is trained on as well | data/preparation.py | prepare | validation_set
- training = job.parts(source, None)["training"]
+ training = job.parts(source, held_out)["training"]
@ any state of a text that is gone will do | data/preparation.py | prepare | that_is_gone
- if len(folders) > 1:
+ if False:
@ what was prepared of another text will do | data/preparation.py | prepare | that_is_gone
- same = manifest["source"] == repr(source) and manifest["held_out"] == held_out
+ same = manifest["held_out"] == held_out
@ folders of living processes are removed | data/folders.py | prepare | killed_processes
- if free or (free is None and old):
+ if free is not None or old:
@ folders of killed processes stay | data/folders.py | prepare | killed
- if free or (free is None and old):
+ if free is None and old:
@ a folder that nobody else can read | data/folders.py | prepare | others_can_read
- folder.mkdir()
-     try:
+ folder.mkdir(mode=0o700)
+     try:
@ sources have the order of the first | data/pipeline.py | blend | orders_of_their_own
- np.random.SeedSequence([seed, n])
+ np.random.SeedSequence([seed, 0])
@ weights of a blend are ignored | data/blend.py | blend | of_one_source or held_out_windows
- return proportions(corpus.weights) if isinstance(corpus, Blended) else (1,)
+ return (1,) * len(corpora_of(corpus))
@ the shares of a blend are not part of its digest | data/blend.py | blend | digest_of_a_blend
- shares = map(str, proportions(self.weights))
+ shares = map(str, [])
@ a corpus skips its first block of a stage | data/order.py | blend | every_beginning
- return n, before - left_before
+ return n, after - left_after
@ the loss of a source is that of another | runs/feed.py | blend | each_source_has
- slice(stop - count, stop)
+ slice(0, count)
@ another validation set is the same data | runs/feed.py | blend | feed_reads
- if self.plan.validation is None:
+ if True:
@ a tiny source gets an equal share | data/order.py | blend | whole_shares
- max(Fraction(w / total).limit_denominator(10**6), least)
+ Fraction(w / total).limit_denominator(10**6) or Fraction(1)
@ a folder and its files are listed twice | data/files.py | files | a_folder_a_file_or_a_pattern
- name = os.path.relpath(file, root or ".").replace(os.sep, "/")
+ name = os.path.relpath(match, root or ".") + (inner and "/" + inner)
@ a file at a URL is its URL | data/files.py | files | url_that_changes
- return " ".join([self.name, self.system.ukey(self.path), *known])
+ return " ".join([self.name, self.system.ukey(self.path)])
@ a server that tells nothing is believed | data/files.py | files | url_that_changes
- else math.inf
+ else 0.0
@ what a server does not tell is not read again after it | data/preparation.py | files | changes_while
- same = self._content(source, stamp) == content
+ same = True
@ any mark of words counts | data/tokenizers.py | tokenizers | mark_of_words
- mark = max(counts, key=lambda m: counts[m])
+ mark = next((m for m in counts if counts[m]), "##")
@ a vocab.txt has no accents | data/tokenizers.py | tokenizers | say_how_text_is_read
- strip_accents=files.strip_accents,
+ strip_accents=None,
@ rows of long words teach nothing | data/objectives.py | objectives | whole_words
- if len(sizes) and sizes.min() > self.predictions:
+ if not len(sizes):
@ shares of held-out windows are of 64 bits | data/batches.py | blend | by_its_weight
- for end in itertools.accumulate(shares)]
+ for end in np.cumsum(shares)]
@ the text that is trained on is held out | data/preparation.py | prepare | no_validation_set
- if training.digest == validating.digest:
+ if training is validating:
@ a packed file of no bytes is an empty text | data/files.py | files | not_whole_is_named
- if not stream.peek(1):
+ if stream.closed:
@ a separator may be half of a character | data/sources.py | files | separator_is_refused
- return bool(text) and text_fault(text) is None
+ return bool(text)
@ a file that cannot be written is lost | values/codec.py | values | stays_as_it_was
- partial.write_text(text, encoding="utf-8")
+ path.write_text(text, encoding="utf-8"), partial.write_text(text)
@ a pipe is replaced by a file | values/codec.py | values | not_replaced
- if path.exists() and not path.is_file():
+ if not path.parent:
@ half of a grown checkpoint stays | runs/checkpoint.py | faults | grown_checkpoint
- shutil.rmtree(partial, ignore_errors=True)
+ partial.exists()
@ a full disk keeps the file of a lock | runs/lock.py | lock | full_disk
- mine.unlink(missing_ok=True)
+ pass
@ TensorBoard shows repeated steps twice | runs/watch.py | progress | every_step_once
- self._add(step, session_log=log(status=log.START))
+ log(status=log.START)
@ TensorBoard lacks what a kill lost | runs/watch.py | progress | every_step_once
- self.has = _number_in(self.closed)
+ self.has = 10**9 if self.folder.exists() else 0
@ TensorBoard gets all again at each session | runs/watch.py | progress | every_step_once
- self.closed.write_text(f"{self.steps}\\n")
+ pass
@ TensorBoard lacks a session without a tracker | runs/watch.py | progress | is_caught_up
- self.has = _number_in(self.closed)
+ self.has = 5
@ a tracker that begins later lacks the beginning | runs/watch.py | progress | begins_later
- self.has = _number_in(self.closed)
+ self.has = 2
@ the error of a tracker is anything | runs/watch.py | progress | error_of_a_tracker
- raise TrainingError(
-                 f"tracker {self.name}
+ raise RuntimeError(
+                 f"tracker {self.name}
@ Weights & Biases lacks what a kill lost | runs/watch.py | progress | server_lacks
- self.has = self.run.step
+ self.has = 10**9
@ an id of a tracker has any character | runs/watch.py | hooks | runs_of_one_name
- _NOT_IN_IDS.sub('-', run.name)
+ run.name
@ one document in two and a half is held out | data/preparation.py | data | always_held_out
- if not isinstance(held_out, int) or held_out < 2:
+ if int(held_out) < 2:
@ an output that was closed is a traceback | cli/__init__.py | output | closed_from_the_start
- if stream is None:
+ if stream == 0:
@ a warning that nobody reads ends a run | cli/__init__.py | output | nobody_reads
- with contextlib.suppress(OSError):
+ with contextlib.suppress(ZeroDivisionError):
@ a full disk of the output is a traceback | cli/__init__.py | output | one_line_of_error
- if error.errno not in _FULL:
+ if error.errno:
@ any error of the system is an output's | cli/__init__.py | output | not_hidden
- if error.errno not in _FULL:
+ if not error.errno:
@ Ctrl-C is lost in a callback | cli/__init__.py | output | callback_loses
- if lost.exc_type is KeyboardInterrupt:
+ if lost.exc_type is ZeroDivisionError:
@ a signal is forgotten between two plans | train/commands.py | stop | keeps_the_next
- if n + 1 < len(tree) and
+ if n > len(tree) and
@ a trial that was stopped is an error | train/commands.py | probe | status_of_a_run
- except TrialStopped as stopped:
+ except ZeroDivisionError as stopped:
@ a signal is forgotten between two trials | train/choosing.py | probe | status_of_a_run
- if signal is not None or
+ if
@ a growth that was copied counts twice | runs/journal.py | commands | counts_once
- if row["kind"] in ("ended", "growth"):
+ if row["kind"] == "ended":
"""
