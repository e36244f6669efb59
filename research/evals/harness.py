"""Our models as a model of lm-evaluation-harness (extra `evals`), which needs no torch here.

What a request means is as in the harness's own Hugging Face backend (0.4.13): where context and
continuation are parted, which end of a long context is cut off, how a long text is scored in
windows. Two things differ. The start token is the one that the model was trained with, and a text
that is scored as a whole is read without it: the prefix token alone stands before. Words that look
like special tokens are plain text.
"""

import collections
import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from models.sampling import Sampling
from research.build import Build
from research.data.errors import DataError
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.evals.continuations import (
    Answer, Continuations, Plan, Request, make_plan, truncated)
from research.evals.generation import Wish, generate_texts
from research.training.logs import duration

# Tokens of a text whose task does not say it, as in the harness; half of a shorter context.
MAX_NEW_TOKENS = 256
DEMONSTRATION_SEED = 1234  # as in the harness
SAY_SECONDS = 5.0
# What a task may say about generation, beside its length, which has several names.
KNOWN = ('until', 'max_gen_toks', 'do_sample', 'temperature', 'top_k', 'top_p')


class HarnessModel(TemplateLM):
  """Answers the harness's requests with the parameters that `params` holds.

  Requests are laid out once: asked again, of other parameters, the same programs run.

  Attributes:
    params: float32, on the mesh of the build; to be set before the harness asks.
    n_requests, n_truncated: requests by task since `begin`, and those of them whose context was
      cut from the left.
  """

  def __init__(self, built: Build, tokenizer: Tokenizer, start_id: int | None, *, seed: int = 0,
               say: Callable[[str], None] = lambda line: None):
    """Binds a model to its tokenizer.

    Args:
      built: the model and its mesh.
      tokenizer: of the model; called `text_tokenizer` here, as the harness reads more of the name
        `tokenizer` than ours has.
      start_id: token before every text in training, None for none.
      seed: of sampled texts.
      say: takes a line of progress every few seconds.

    Raises UserError where no token can stand before a text.
    """
    super().__init__()
    self.params: Any = None
    self.text_tokenizer, self.start_id = tokenizer, start_id
    self._built, self._seed, self._say = built, seed, say
    self._continuations = Continuations(built)
    self._plans: dict[str, tuple[Plan, list[int], collections.Counter]] = {}
    known = [i for i in (start_id, tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    if not known:
      raise UserError('the tokenizer has neither a start nor an end token, one of which must stand '
                      'before a text that is scored as a whole')
    self._prefix_id = known[0]
    self.begin()

  def begin(self) -> None:
    """Counts from zero again."""
    self.n_requests: collections.Counter = collections.Counter()
    self.n_truncated: collections.Counter = collections.Counter()
    self._asked = hashlib.sha256()

  @property
  def asked(self) -> str:
    """Hash of all requests since `begin`: the same for every checkpoint if it's the same task."""
    return self._asked.hexdigest()

  @property
  def eot_token_id(self) -> int:
    """The token that ends a document, or the one that begins it where there is no other."""
    eos_id = self.text_tokenizer.eos_id
    return self._prefix_id if eos_id is None else eos_id

  @property
  def prefix_token_id(self) -> int:
    """The token that stands before a text without context."""
    return self._prefix_id

  @property
  def max_length(self) -> int:
    """Tokens that the model can see."""
    return self._built.config.model.context_length

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
    """Returns the tokens of a text, after the start token unless told otherwise."""
    del kwargs
    start = self.start_id is not None and add_special_tokens is not False
    return [self.start_id] * start + self.text_tokenizer.encode(string)

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True
                    ) -> list[tuple[float, bool]]:
    """Returns log-probability in nats and greediness of each continuation after its context."""
    del disable_tqdm
    return [tuple(answer) for answer in self._answers(requests, self._pair)[0]]

  def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
    """Returns what `loglikelihood` does of ((context, continuation), their tokens)."""
    plan = make_plan([truncated(Request(tuple(context), tuple(continuation)), self.max_length)
                      for _, context, continuation in requests], self._built)
    return [tuple(answer) for answer in self._continuations.answers(plan, self.params)]

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True
                            ) -> list[float]:
    """Returns the log-probability in nats of each text, scored in windows of the context length."""
    del disable_tqdm
    answers, owners = self._answers(requests, self._windows)
    sums = [0.0] * len(requests)
    for owner, answer in zip(owners, answers, strict=True):
      sums[owner] += answer.logp
    return sums

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
    """Returns the text that goes on from each context, up to a stop text."""
    del disable_tqdm
    self._note(requests)
    wishes = [self._each(request, self._wish) for request in requests]
    return generate_texts(wishes, self._built, self.text_tokenizer, self.params, seed=self._seed,
                          progress=self._progress(len(wishes), 'texts'))

  def _answers(self, requests: list[Instance], parts: Callable[[Instance], list[Request]]
               ) -> tuple[list[Answer], list[int]]:
    """Returns answers to what the requests consist of, and the request of each."""
    key = f'{parts.__name__} {self._note(requests)}'
    if key not in self._plans:
      asked, owners, cut = [], [], collections.Counter()
      for i, request in enumerate(requests):
        whole = self._each(request, parts)
        seen = [self._each(request, lambda _: truncated(part, self.max_length)) for part in whole]
        cut[request.task_name] += seen != whole
        asked += seen
        owners += [i] * len(seen)
      self._plans[key] = make_plan(asked, self._built), owners, cut
    plan, owners, cut = self._plans[key]
    self.n_truncated += cut
    progress = self._progress(plan.n_requests, 'continuations')
    return self._continuations.answers(plan, self.params, progress), owners

  def _note(self, requests: list[Instance]) -> str:
    """Counts requests by task; returns their hash."""
    self.n_requests.update(request.task_name for request in requests)
    text = json.dumps([[request.task_name, request.args] for request in requests], default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    self._asked.update(digest.encode())
    return digest

  def _each(self, request: Instance, function: Callable[[Instance], Any]) -> Any:
    """Returns function(request); where that cannot be tokenized or run, says of which document."""
    try:
      return function(request)
    except (UserError, ValueError) as error:
      raise UserError(f'task {request.task_name}, document {request.doc_id}: {error}') from error

  def _pair(self, request: Instance) -> list[Request]:
    """Returns context and continuation in tokens, parted as the harness does."""
    context, continuation = request.args
    if context:
      context_ids, ids = self._encode_pair(context, continuation)
    else:
      ids = self.tok_encode(continuation, add_special_tokens=False)
      context_ids = [self._prefix_id]
      if ids[:1] == context_ids:
        context_ids, ids = ids[:1], ids[1:]
    if not ids:
      raise DataError(f'continuation {continuation!r} adds no token to its context')
    # A context of white space alone has no token of its own.
    return [Request(tuple(context_ids or [self._prefix_id]), tuple(ids))]

  def _windows(self, request: Instance) -> list[Request]:
    """Returns the windows of a text: each token is predicted once."""
    tokens = self.tok_encode(request.args[0], add_special_tokens=False)
    windows = get_rolling_token_windows(tokens, self._prefix_id, self.max_length, 1)
    return [Request(*map(tuple, make_disjoint_window(window))) for window in windows]

  def _wish(self, request: Instance) -> Wish:
    """Returns what a task wants written; the prompt is cut from the left to leave room for it."""
    context, given = request.args
    limit = min(MAX_NEW_TOKENS, self.max_length // 2)
    kwargs = normalize_gen_kwargs(given, limit)
    unknown = [name for name, value in kwargs.items()
               if name not in KNOWN and (name, value) != ('num_beams', 1)]
    if unknown:
      raise UserError(f'generation_kwargs.{unknown[0]} is not known; known are {", ".join(KNOWN)}')
    n_new = kwargs['max_gen_toks']
    if not 1 <= n_new < self.max_length:
      raise UserError(f'generation_kwargs.max_gen_toks={n_new} leaves no room for a prompt; with '
                      f'model.context_length={self.max_length} at most {self.max_length - 1}')
    tokens = self.tok_encode(context) or [self._prefix_id]
    self.n_truncated[request.task_name] += len(tokens) > self.max_length - n_new
    eos = self.text_tokenizer.decode([self.eot_token_id])
    return Wish(tuple(tokens[-(self.max_length - n_new):]),
                tuple(handle_stop_sequences(list(kwargs['until']), eos)), n_new,
                self._sampling(kwargs))

  def _sampling(self, kwargs: dict[str, Any]) -> Sampling:
    """Returns how a task's tokens are drawn."""
    if not kwargs['do_sample']:
      return Sampling(temperature=0.0, n_tokens=self.text_tokenizer.vocab_size)
    return Sampling(float(kwargs.get('temperature', 1.0)), int(kwargs.get('top_k') or 0),
                    float(kwargs.get('top_p', 1.0)), self.text_tokenizer.vocab_size)

  def _progress(self, n: int, what: str) -> Callable[[int], None]:
    """Returns what says every few seconds how many are done and how long the rest takes."""
    began = said = time.perf_counter()

    def progress(done: int) -> None:
      nonlocal said
      now = time.perf_counter()
      if now - said > SAY_SECONDS and 0 < done < n:
        said = now
        left = duration((now - began) / done * (n - done))
        self._say(f'{done:,} of {n:,} {what}, {left} left')
    return progress


def evaluated(model: HarnessModel, loaded: dict[str, Any], *, limit: int | None,
              bootstrap_iters: int) -> dict[str, Any]:
  """Returns the harness's results of loaded tasks for the parameters that the model holds.

  Args:
    model: with its parameters.
    loaded: from `harness_tasks.load`.
    limit: documents of a task, the first ones; None for all.
    bootstrap_iters: resamples behind the errors of metrics that have no formula for theirs.
  """
  model.begin()
  for task in loaded['tasks'].values():
    task.set_fewshot_seed(seed=DEMONSTRATION_SEED)  # Every checkpoint sees the same ones.
  with contextlib.redirect_stdout(sys.stderr):  # It prints that it resamples.
    return evaluate(lm=model, task_dict=loaded, limit=limit, log_samples=False,
                    bootstrap_iters=bootstrap_iters)
