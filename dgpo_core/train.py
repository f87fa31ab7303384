"""`python -m dgpo_core.train`: a whole run, from settings to a LoRA and a proof of its gain.

The run folder is written as it goes: config.yaml, metrics.jsonl, reward.png, samples/, checkpoints/, and at the end
lora.safetensors and summary.json.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dgpo_core.benchmark.auto import decided
from dgpo_core.common import patience
from dgpo_core.common.distributed import World, together
from dgpo_core.common.errors import Diverged, Interrupted, UserError
from dgpo_core.common.files import write_atomic
from dgpo_core.common.pictures import png, reward_curve
from dgpo_core.common.prompt_syntax import syntax_warning
from dgpo_core.common.prompts import Prompt
from dgpo_core.common.terminal import say
from dgpo_core.evaluation.evaluator import Evaluator, Watch, side_by_side
from dgpo_core.evaluation.held_out import HeldOut
from dgpo_core.evaluation.scores import Evaluation, Measurement
from dgpo_core.method.iteration import Iteration
from dgpo_core.method.offline import RatedGroups
from dgpo_core.method.trainer import Trainer
from dgpo_core.policy import AdapterName, Policy
from dgpo_core.rewards import guard, trust
from dgpo_core.runs import assemble, origin
from dgpo_core.runs.begun import Begun
from dgpo_core.runs.checkpoint import (
    best_checkpoint,
    checkpoint_path,
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    step_of,
)
from dgpo_core.runs.few_steps import few_steps_warning
from dgpo_core.runs.options import parse_args
from dgpo_core.runs.run import Run
from dgpo_core.runs.stop import Stop
from dgpo_core.settings.command_line import command
from dgpo_core.settings.config import Config
from dgpo_core.settings.resuming import fingerprint


@dataclass
class Session:
    """Everything one training run works with.

    iterate: the next iteration. begun: what a resumed run must have been begun with.
    """

    config: Config
    world: World
    policy: Policy
    trainer: Trainer
    evaluator: Evaluator
    check: Callable[[], None]
    iterate: Callable[[], Iteration]
    begun: Begun = field(default_factory=Begun)
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)
    over: bool = False  # whether the minutes that the settings give it are

    def look_at_the_clock(self) -> None:
        """Sees whether they are, for all processes alike."""
        minutes = self.config.minutes
        self.over = bool(minutes) and self.world.any(self.elapsed() >= 60 * minutes)

    @property
    def adapter(self) -> AdapterName:
        """The weights that are evaluated and saved."""
        return self.config.evaluation.weights

    def read_ahead(self) -> None:
        """All prompts that this process will be asked for, in the order in which it will."""
        images = max(self.config.evaluation.images, self.config.evaluation.final_images)
        texts = self.evaluator.texts(images, self.shown)
        self.policy.read_ahead([*texts, *self.trainer.texts()], self.check)

    @property
    def shown(self) -> Sequence[Prompt]:
        """The prompts of the pictures in samples/."""
        return self.evaluator.held_out.prompts or self.trainer.stream.prompts

    def elapsed(self) -> float:
        """Seconds of the run so far, those before a resume included."""
        return self.seconds + time.monotonic() - self.started

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Afterwards the rewards have let go of everything; that one cannot is told where nothing worse was."""
        try:
            yield
        except BaseException:
            with suppress(UserError):
                guard.close(self.trainer.rewards)
            raise
        guard.close(self.trainer.rewards)


def open_session(config: Config, world: World, check: Callable[[], None], tell: Callable[[str], None]) -> Session:
    """Load and check everything that the run needs; nothing is written."""
    gallery = assemble.rated_groups(config)
    _tell_first(gallery.notes if gallery else (), world, tell)
    prompts, held_out = assemble.training_prompts(config, gallery), assemble.held_out_prompts(config)
    if assemble.asks_a_person(config) and world.size > 1:
        raise UserError("The reward human asks one person about all images: start the training as one process.")
    rewards = assemble.training_rewards(config, world.device, check, tell)
    judges = assemble.judges(config, rewards, held_out, world.device)
    guard.check_prompts(rewards, prompts)
    guard.check_prompts(judges, held_out)
    warning = syntax_warning([*prompts, *held_out])
    _tell_first([f"Warning: {warning}"] if warning else (), world, tell)
    config = decided(config, world, tell)
    policy, size = assemble.load_model(config, world.device)
    warning = few_steps_warning(policy.few_steps, config.rollout, config.evaluation)
    _tell_first([f"Warning: {warning}"] if warning else (), world, tell)
    if gallery:
        gallery = gallery.fitting(size)
        _tell_first(gallery.notes, world, tell)
        prompts = assemble.training_prompts(config, gallery)
    policy.check_sources([*prompts, *held_out], size)
    # tells a bad solver before it trains
    measured = HeldOut.of(config, policy, held_out, judges, size, world, check, tell)
    trainer = Trainer(policy, prompts, rewards, config, size=size, world=world, check=check, tell=tell)
    iterate = trainer.iterate
    if gallery:
        rated = RatedGroups(gallery.groups, config.data.groups_per_iteration, trainer.stream.seed)
        iterate = partial(trainer.iterate_rated, rated)
    evaluator = Evaluator(measured, Watch.of(config, judges))
    return Session(config, world, policy, trainer, evaluator, check, iterate, Begun.with_(gallery, judges))


def _tell_first(notes: Sequence[str], world: World, tell: Callable[[str], None]) -> None:
    """What should be known before the first image, once for all processes."""
    for note in notes if world.leads else ():
        tell(note)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 2 after a user's mistake, 130 after Ctrl-C."""
    return command(lambda: parse_args(argv), _train)


def _train(config: Config) -> None:
    stop = Stop()
    with stop.listening():
        train(config, stop.check)


def train(config: Config, check: Callable[[], None]) -> None:
    """Run or resume `config`. Raises UserError, and Interrupted where `check` does; a checkpoint is left then."""
    with together(config.model.device) as world:
        config = Run.as_before(config)
        Run.check(config)  # before the minutes that a large model takes to load
        world.any(False)  # all have looked: a slow one would take the folder that the first makes for another run's

        def asked() -> None:
            check()
            world.check()

        for line in trust.uses(config) if world.leads else ():
            say(line)
        session = open_session(config, world, asked, say)
        with session.closing():
            if not world.leads:
                _iterate(session, None)
                return
            with Run.open(session.config) as run:
                _iterate(session, run)


def _iterate(session: Session, run: Run | None) -> None:
    """The run from its start or its newest checkpoint to its end. `run` is None on all processes but the first."""
    trainer, config = session.trainer, session.config
    done = _resume(session, run)  # what is wrong with a checkpoint leaves the run as it is
    session.read_ahead()
    try:
        with patience.asking(session.check):
            _steps(session, run, done)
    except (Interrupted, UserError) as ending:
        session.world.leave(ending)  # nobody waits for the checkpoint
        if run:
            kept = not isinstance(ending, Diverged)
            if kept:
                _checkpoint(session, run)
            after = "--resume goes on from there" if kept else "its weights are not kept"
            say(f"Stopped after iteration {trainer.iteration} of {config.iterations}; {after}.")
        raise


def _steps(session: Session, run: Run | None, done: int) -> None:
    """All that is left to do of the run, of which `done` iterations are."""
    trainer, config = session.trainer, session.config
    if done == 0:
        _evaluate(session, run, None, config.evaluation.final_images)
        _samples(session, run, None)
    elif session.world.any(run is not None and not _is_measured(run, trainer.iteration)):
        _now_and_then(session, run)  # an evaluation that Ctrl-C cut off
    if done:
        session.look_at_the_clock()
    total = None if config.minutes else config.iterations
    with tqdm(total=total, initial=trainer.iteration, unit="it", disable=run is None) as bar:
        while trainer.iteration < config.iterations and not session.over and not _is_stopped(session):
            _log(run, session.iterate(), trainer.iteration, bar)
            session.look_at_the_clock()
            _now_and_then(session, run)
    _finish(session, run)


def _is_measured(run: Run, step: int) -> bool:
    return any(record["iteration"] == step and "held_out" in record for record in run.history())


def _log(run: Run | None, iteration: Iteration, step: int, bar: tqdm) -> None:
    """One line in metrics.jsonl, one move of the bar."""
    bar.update()
    if "reward" in iteration.metrics:
        bar.set_postfix(reward=f"{iteration.metrics['reward']:.3f}", refresh=False)
    if run:
        for warning in iteration.warnings:
            say(f"Iteration {step}: {warning}.")
        run.append_metrics({"iteration": step, **iteration.metrics, "seconds": iteration.seconds})


def _now_and_then(session: Session, run: Run | None) -> None:
    """What is not done at every iteration. A checkpoint comes last: it stands for all that was written before it."""
    config, step = session.config, session.trainer.iteration
    last = step == config.iterations or session.over
    if config.evaluation.every and step % config.evaluation.every == 0 and not last:
        _evaluate(session, run, session.adapter, config.evaluation.images)
        _samples(session, run, session.adapter)
    if run and (step % config.checkpoint.every == 0 or last or _is_stopped(session)):
        _checkpoint(session, run)


def _evaluate(session: Session, run: Run | None, adapter: AdapterName | None, images: int) -> None:
    """Measure on held-out prompts, note it, draw the curve anew, warn, and keep the state that is best so far."""
    evaluator, step = session.evaluator, session.trainer.iteration
    if not (images and evaluator.measures):
        return
    evaluator.history = [e for e in evaluator.history if e.iteration != step] + [evaluator.at(step, adapter, images)]
    if not run:
        return
    evaluator.history[-1].save(run.evaluation_path(step))
    record = evaluator.watch.record(evaluator.history)
    if record not in run.history():  # a run that was killed at its very end measures the same again
        run.append_metrics(record)
    write_atomic(run.reward_png, png(reward_curve(run.history(), evaluator.watch.title)))
    say(f"Iteration {step}: held-out {evaluator.watch.measure(evaluator.history[-1])}\n  {side_by_side(record)}")
    for warning in record.get("alarms", {}).values():
        say(f"Warning: {warning}.")
    if evaluator.watch.best(evaluator.history) is evaluator.history[-1]:
        _save_state(session, best_checkpoint(run.checkpoints))


def _is_stopped(session: Session) -> bool:
    """Whether an alarm ends the run; every process sees the same evaluations."""
    evaluator = session.evaluator
    return session.config.evaluation.on_alarm == "stop" and bool(evaluator.watch.alarms(evaluator.history))


def _samples(session: Session, run: Run | None, adapter: AdapterName | None) -> None:
    """The same prompts and seeds at every call, as one labelled picture in samples/."""
    if run:
        step = session.trainer.iteration
        run.write_samples(step, session.evaluator.samples(step, adapter, session.shown))


def _checkpoint(session: Session, run: Run) -> None:
    newest = checkpoint_path(run.checkpoints, session.trainer.iteration)
    _save_state(session, newest)
    prune_checkpoints(newest, session.config.checkpoint.keep)


def _save_state(session: Session, path: Path) -> None:
    tensors, info = session.trainer.state()
    info |= {"seconds": session.elapsed(), "fingerprint": fingerprint(session.config)}
    info |= {"prompts": session.trainer.turns.digest, **session.begun.info(), **session.evaluator.state()}
    save_checkpoint(path, tensors, info)


def _resume(session: Session, run: Run | None) -> int:
    """Go back to the newest checkpoint, if the run is resumed and has one; returns the iterations that are done."""
    if not session.config.resume:
        return 0
    folder = Path(session.config.output, session.config.name, "checkpoints")
    newest = latest_checkpoint(folder)
    info: dict[str, Any] = {}
    if newest:
        tensors, info = load_checkpoint(newest, fingerprint(session.config))
        session.begun.require(info, session.config)
        session.trainer.load_state(tensors, info)
        if run and info.get("prompts", "") not in ("", session.trainer.turns.digest):
            say("Warning: the training prompts are not those that the run began with; it goes on with the new ones.")
        seconds = info.get("seconds")
        session.seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
    step, evaluator = session.trainer.iteration, session.evaluator
    lost = evaluator.go_on(info, folder.with_name("evaluations"), step)
    if run:
        bad = run.truncate_metrics(step if step else -1)
        for count, what in ((bad, "line(s) of metrics.jsonl"), (lost, "file(s) in evaluations/")):
            if count:
                say(f"Warning: {count} {what} cannot be read and are left out.")
    return step


def _finish(session: Session, run: Run | None) -> None:
    """Measure once more, save the adapter and the summary, and tell."""
    config, evaluator, trainer = session.config, session.evaluator, session.trainer
    if not _is_stopped(session):
        _evaluate(session, run, session.adapter, config.evaluation.final_images)
        _samples(session, run, session.adapter)
    made, after = trainer.iteration, evaluator.history[-1] if evaluator.history else None
    stopped = _is_stopped(session)  # or by this very evaluation
    saved = ""
    if stopped:
        saved = _go_back(session)
        images = config.evaluation.final_images or config.evaluation.images
        after = evaluator.at(trainer.iteration, session.adapter, images)
    if not run:
        return
    session.policy.save_lora(run.lora_path, origin.describe(config, trainer.iteration), session.adapter)
    summary = {"seconds": session.elapsed(), "iterations": made}
    summary |= {"stopped_at": made, "iterations": trainer.iteration} if stopped else {}
    trained = [term.name for term in config.reward]
    _conclude(run, evaluator, trained, after if after and after.iteration == trainer.iteration else None, summary)
    if stopped:
        say(f"Stopped after iteration {made}; lora.safetensors is {saved}.")
    _point_to(run, summary)


def _conclude(
    run: Run, evaluator: Evaluator, trained: Sequence[str], after: Evaluation | None, summary: dict[str, Any]
) -> None:
    """Write the summary and tell what came of the run. trained: the rewards that were trained on. after: the evaluation
    of the adapter that is saved."""
    name = "+".join(evaluator.watch.measured or trained)
    # gone where somebody has deleted metrics.jsonl before a resume
    started = run.history() if not evaluator.since else []
    before = next((r for r in started if r["iteration"] == 0 and "held_out" in r), None)
    alarms = evaluator.watch.alarms(evaluator.history)
    summary = {"reward": name, **summary} | ({"alarms": [str(alarm) for alarm in alarms]} if alarms else {})
    if after and before and None not in (before["held_out"], before["n"], *before["held_out_ci95"]):
        base = Measurement(before["held_out"], tuple(before["held_out_ci95"]), before["n"])
        found = evaluator.watch.measure(after)
        summary |= {"base": base.as_json(), "adapter": found.as_json()}
        say(f"\n{name} on held-out prompts\n  before  {base}\n  after   {found}")
    run.write_json(run.summary_path, summary)
    for alarm in alarms:
        say(f"Warning: {alarm}.")


def _point_to(run: Run, summary: Mapping[str, Any]) -> None:
    minutes = summary["seconds"] / 60
    say(f"{summary['iterations']} iterations in {minutes:.1f} minutes; everything is in {run.folder}:")
    say("  lora.safetensors (the adapter), samples/ (before, during, after), reward.png, summary.json")


def _go_back(session: Session) -> str:
    """To the best state after an alarm, or to the nearest one that can be had; in words, which that is.

    Every process finds the same.
    """
    folder = Path(session.config.output, session.config.name, "checkpoints")
    best = session.evaluator.watch.best(session.evaluator.history).iteration
    if _load(session, best_checkpoint(folder)):
        step = session.trainer.iteration
        return f"the adapter after iteration {step}, the best before the decline" if step else "untrained: all declined"
    for path in sorted(checkpoints(folder), key=lambda path: abs(step_of(path) - best)):
        if _load(session, path):
            break
    which = f"the adapter after iteration {session.trainer.iteration}"
    return f"{which}, as the best before the decline (iteration {best}) cannot be read from best.safetensors any more"


def _load(session: Session, path: Path) -> bool:
    """Go back to a checkpoint of this run, if it is whole."""
    try:
        tensors, info = load_checkpoint(path, fingerprint(session.config))
        session.trainer.load_state(tensors, info)
    except UserError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
