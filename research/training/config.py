"""Settings of the optimizer, the compiled step, checkpoints, evaluation and logging."""

import dataclasses
import math
from typing import Annotated as A
from typing import ClassVar

OPTIMIZERS = ('adamw', 'muon', 'adafactor', 'lion', 'sgd')
SCHEDULES = ('constant', 'cosine', 'wsd', 'linear', 'inverse_sqrt')


def _one_of(field: str, value: str, allowed: tuple[str, ...]) -> None:
  if value not in allowed:
    raise ValueError(f'{field}={value!r} must be one of {", ".join(allowed)}')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """The optimizer, its learning-rate schedule and what surrounds the update."""

  KIND: ClassVar[str] = 'identity'

  name: A[str, 'adamw, muon, adafactor, lion or sgd'] = 'adamw'
  peak_lr: A[float, 'learning rate after warm-up'] = 1e-3
  schedule: A[str, 'constant, cosine, wsd, linear or inverse_sqrt, after linear warm-up'] = 'cosine'
  warmup_steps: A[int, 'steps of linear warm-up from zero'] = 100
  decay_fraction: A[float, 'wsd: share of all steps spent in the final linear decay'] = 0.2
  final_lr_fraction: A[float, 'learning rate at the end, as a share of peak_lr'] = 0.0
  b1: A[float, 'decay of the first moment (sgd: momentum)'] = 0.9
  b2: A[float, 'decay of the second moment'] = 0.95
  eps: A[float, 'added to the root of the second moment'] = 1e-8
  weight_decay: A[float, 'decoupled decay of matrices, times the learning rate'] = 0.1
  decay_embeddings: A[bool, 'decay embedding and unembedding too; norms and biases never'] = False
  clip_norm: A[float, 'largest global gradient norm; 0 turns clipping off'] = 1.0
  moment_dtype: A[str, 'dtype of the first moment: float32 or bfloat16'] = 'float32'
  ema_decay: A[float, 'decay of the moving average of the parameters; 0 keeps none'] = 0.0
  z_weight: A[float, 'weight of the squared log-partition term of the loss'] = 0.0

  def __post_init__(self):
    _one_of('optimizer.name', self.name, OPTIMIZERS)
    _one_of('optimizer.schedule', self.schedule, SCHEDULES)
    _one_of('optimizer.moment_dtype', self.moment_dtype, ('float32', 'bfloat16'))
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f'optimizer.{field.name}={value} must be a finite number')
    for field in ('b1', 'b2', 'ema_decay'):
      if not 0 <= getattr(self, field) < 1:
        raise ValueError(f'optimizer.{field}={getattr(self, field)} must lie in [0, 1)')
    for field in ('peak_lr', 'warmup_steps', 'weight_decay', 'clip_norm', 'z_weight', 'eps',
                  'final_lr_fraction'):
      if getattr(self, field) < 0:
        raise ValueError(f'optimizer.{field}={getattr(self, field)} must not be negative')
    if not 0 < self.decay_fraction <= 1:
      raise ValueError(f'optimizer.decay_fraction={self.decay_fraction} must lie in (0, 1]')


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Which steps change nothing: those that are not finite always, spikes above a usual level.

  The usual level is the median of the last `window` finite steps, its scale 1.4826 times their
  median absolute deviation (the standard deviation of a Gaussian), of the loss in nats and of the
  logarithm of the gradient norm. Over 21 healthy runs of the micro-world and of text (45,000
  steps) no loss was more than 9.2 such scales above its median and no norm more than 27.
  """

  KIND: ClassVar[str] = 'identity'

  spike_threshold: A[float, 'scales above the usual loss or logarithm of the gradient norm from '
                     'which a step is skipped; 0 skips none that is finite'] = 40.0
  window: A[int, 'finite steps that tell what is usual; before there are so many none is a spike'] = 64
  stop_after: A[int, 'skipped steps in a row that stop the run, by when one more is under '
                'way; 0 never stops it', 'placement'] = 20

  def __post_init__(self):
    if not (math.isfinite(self.spike_threshold) and self.spike_threshold >= 0):
      raise ValueError(f'guards.spike_threshold={self.spike_threshold} must be a finite number, '
                       'at least 0')
    if self.window < 3:
      raise ValueError(f'guards.window={self.window} must be at least 3 for a median deviation')
    if self.stop_after < 0:
      raise ValueError(f'guards.stop_after={self.stop_after} must not be negative')


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
  """When a run that makes no progress says where it hangs."""

  KIND: ClassVar[str] = 'placement'

  seconds: A[float, 'time without progress after which a process names its phase and writes its '
             'stacks; compiling a step counts, too; 0: never'] = 600.0
  abort: A[bool, 'whether it then ends, with code 75, for a scheduler to start it again; not '
           'before its first step is done, nor in the report'] = False

  def __post_init__(self):
    if not (math.isfinite(self.seconds) and self.seconds >= 0):
      raise ValueError(f'watchdog.seconds={self.seconds} must be a finite number, at least 0')
    if self.abort and not self.seconds:
      raise ValueError('watchdog.abort needs watchdog.seconds above 0')


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the compiled step cuts up its work; resolved once, recorded in the manifest, reused."""

  KIND: ClassVar[str] = 'placement'

  microbatch_tokens: A[int, 'tokens per micro-batch on a device inside the step; 0 chooses '
                       'by platform and width (CPU: what stays in cache; a pipeline: 4 per stage; '
                       'else the whole batch)'] = 0
  loss_chunk: A[int, 'tokens whose logits exist at one time'] = 1024
  matmul_precision: A[str, "precision of f32 matmuls: 'default', 'high' or 'highest'"] = 'default'
  gather: A[str, "when split parameters are made whole: 'layer' (each where it runs, again in "
            "backward) or 'step' (all once; gradients are scattered once)"] = 'layer'
  reduce_dtype: A[str, 'dtype in which gradients are summed over devices: float32 or '
                  'bfloat16'] = 'float32'
  sequence: A[bool, 'whether mesh.tensor also splits the tokens between the branches of a '
              'block'] = True
  context: A[str, "attention over mesh.context: 'ring' (keys go round) or 'all_to_all' (each "
             'device has whole rows of some heads)'] = 'ring'
  pipeline: A[str, "schedule of mesh.stage: '1f1b', 'interleaved' or 'gpipe'"] = '1f1b'
  pipeline_chunks: A[int, "chunks of layers per stage, several with 'interleaved' only"] = 1

  def __post_init__(self):
    _one_of('compute.matmul_precision', self.matmul_precision, ('default', 'high', 'highest'))
    _one_of('compute.gather', self.gather, ('layer', 'step'))
    _one_of('compute.reduce_dtype', self.reduce_dtype, ('float32', 'bfloat16'))
    _one_of('compute.context', self.context, ('ring', 'all_to_all'))
    _one_of('compute.pipeline', self.pipeline, ('1f1b', 'interleaved', 'gpipe'))
    if self.microbatch_tokens < 0 or self.loss_chunk < 1:
      raise ValueError('compute.microbatch_tokens must be >= 0 and compute.loss_chunk >= 1')
    if self.pipeline_chunks < 1 or (self.pipeline != 'interleaved' and self.pipeline_chunks > 1):
      raise ValueError(f'compute.pipeline_chunks={self.pipeline_chunks} does not go with '
                       f'compute.pipeline={self.pipeline!r}: 1 there, more with interleaved')


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """When state is saved: full checkpoints to resume from, dense snapshots to analyze."""

  KIND: ClassVar[str] = 'placement'

  every: A[int, 'steps between full checkpoints'] = 1000
  keep: A[int, 'latest full checkpoints that stay on disk; 0 keeps all'] = 2
  snapshot_every: A[int, 'steps between parameter snapshots, each of them monitored; 0: none'] = 20
  snapshot_dtype: A[str, 'dtype in which snapshots are stored and scored: float32 or '
                    'bfloat16', 'identity'] = 'float32'

  def __post_init__(self):
    if self.every < 1:
      raise ValueError(f'checkpoints.every={self.every} must be at least 1')
    if self.keep < 0 or self.snapshot_every < 0:
      raise ValueError('checkpoints.keep and checkpoints.snapshot_every must not be negative')
    _one_of('checkpoints.snapshot_dtype', self.snapshot_dtype, ('float32', 'bfloat16'))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out loss during training."""

  KIND: ClassVar[str] = 'placement'

  every: A[int, 'steps between held-out evaluations; 0: none'] = 100
  n_batches: A[int, 'batches of held-out rows per evaluation'] = 4

  def __post_init__(self):
    if self.every < 0 or self.n_batches < 1:
      raise ValueError('evals.every must be >= 0 and evals.n_batches >= 1')


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
  """What the run says while it works."""

  KIND: ClassVar[str] = 'placement'

  progress_seconds: A[float, 'seconds between progress lines when output is not a terminal'] = 10.0
  tensorboard: A[bool, 'write TensorBoard events beside metrics.jsonl'] = True


@dataclasses.dataclass(frozen=True)
class StartConfig:
  """Where the parameters come from when not from initialization."""

  KIND: ClassVar[str] = 'identity'

  run_dir: A[str, "a run directory whose checkpoint this run starts from; '' initializes"] = ''
  step: A[int, 'the step of that checkpoint; -1 is its last'] = -1
  optimizer: A[bool, 'take over the optimizer state too, else it starts fresh'] = False
