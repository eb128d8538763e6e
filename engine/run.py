"""A run: everything about training that is not the method, behind a handful of names.

    with Run(plan, world) as run:           the folder, its lock, the newest good state
        run.read_text()                     tokenised once
        run.begin(weights, held_out)        a resumed run's weights, the log, signals
        for stage in run.stages():          those that are left
            with run.training(...):         Adam's moments of a resumed run; memory that runs out
                for n in run.steps(stage):  those that are left, of each:
                    micro_batches, figures, agree, log, save_if_due, stopping
            run.end_stage(stage)            saved

What must hold.  All processes take the same decisions: to stop, to save, to refuse a loss that is
not finite (`agree`). All write a state's files; everything else rank 0 alone. Where models are cut
over processes, all of them measure. A state is begun every --save-minutes, on a stop, and when a
stage is done; one after a stage is not whole before that is measured, and holds weights alone, as
the next stage begins with a new Adam. It is written while the run goes on (states.py), into the
next stage or beside the export, and the run waits for the copy alone, and for the state before
where that is not whole yet. Beside the last stage's steps rank 0 begins the export (head_start.py),
which gives way to states and stops.

Limits.  One run per folder at a time (folder.py); what a kill costs stands in resume.py.
"""

import contextlib
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine import cost, data, exits, folder, plan, resume, states, watch
from engine.announce import describe_text
from engine.compile_ahead import compile_ahead
from engine.cost import Stage
from engine.head_start import HeadStart
from engine.lookups import Lookups
from engine.machine import versions
from engine.parallel import World, lost
from engine.plan import Plan
from engine.sequence import processes_per_block
from engine.skips import positions
from engine.states import Job, Saver
from engine.timing import Times
from hub import files
from model import Llama

_QUIET = 5.0  # seconds that a stop waits for a state before it says so


class Run:
    """One run of a plan. `world`: this process's place among all."""

    def __init__(self, plan: Plan, world: World):
        self.plan, self.world, self.args = plan, world, plan.args
        self.times = Times("start", exits.BEGAN)
        self.out = folder.Folder(self.args.out, "train.py", active=world.main)
        self.saving = self.stopping = False  # what all processes agreed on in this step
        self.saver = self.stop_request = None
        self.head_start = HeadStart(self.out)
        self.compiling = None
        self.measured = True  # does the table have the column that the state at work waits for?

    # ---- where it is written, and where it begins

    def find(self) -> None:
        """Where the run begins: at zero or, with --resume, where the newest good state says."""
        if self.args.dry_run and not self.args.resume:
            return
        args, stages = self.args, self.plan.stages
        # 0 where there is no table; None: one block without look-ups, as where the flag is left out
        blocks = self.plan.blocks if self.plan.documents else args.eval_blocks
        self.depends = resume.matters(args, stages, blocks)
        # 13 GB take a while: beside loading and tokenising
        self.digest = Job(resume.digest, args.teacher) if self.world.main else None
        if args.dry_run and self.digest:
            self.depends[resume.TEACHERS_FILES] = self.digest.result()
        self.at = self.world.on_main(resume.find, args, self.depends, stages)

    def __enter__(self) -> "Run":
        with contextlib.ExitStack() as folder_lock:
            folder_lock.enter_context(self.out)
            # Another run may have come and gone since
            self.world.on_main(plan.check_folder, self.args)
            holder = self.world.on_main((self.args.out / folder.LOCK).read_text)
            self.world.on_all(self._refuse_apart, holder)
            self.find()
            self._folder_lock = folder_lock.pop_all()  # nothing was refused: it is kept
        self.compiling = compile_ahead(self.plan)
        return self

    def _refuse_apart(self, holder: str) -> None:
        """Raises ValueError where this process does not see the folder that the first one took:

        its lock, which says `holder`. An earlier run may have left another.
        """
        lock = self.args.out / folder.LOCK
        if not lock.is_file() or lock.read_text() != holder:
            raise ValueError(
                f"process {self.world.rank} does not see {self.args.out}, where each writes its "
                "part of a state; name a folder on a disk that all machines share"
            )

    def __exit__(self, kind, error, trace) -> None:
        self.head_start.stop()
        self._finish_alone()
        self._folder_lock.__exit__(kind, error, trace)
        if self.world.size > 1 and lost(error):
            if self.stop_request and not self.world.main:  # torchrun ends all: that is no news
                raise KeyboardInterrupt from None
            ended = f"another process of this run has ended{self.world.peers.kept}"
            raise ValueError(ended) from None

    def _finish_alone(self) -> None:
        """Waits for the state at work, if it is one: after a stage what was not measured is none.

        Several processes could not agree on it any more.
        """
        if self.saver and self.measured and self.world.size == 1:
            with contextlib.suppress(ValueError):
                self.saver.finish()

    def promise(self) -> str:
        """The end of a sentence that ends the run, once the state at work is whole or is none."""
        self._finish_alone()
        return self.saver.promise()

    def read_text(self) -> data.Corpus:
        """The text, tokenised by the first process, once all else is known to be right."""
        args, stages, tokenizer = self.args, self.plan.stages, self.plan.tokenizer

        def check(corpus: data.Corpus) -> None:
            documents = Lookups(tokenizer, corpus.train) if args.lookups else None
            plan.check_text(corpus, stages, documents)
            self.depends["text"] = corpus.digest
            if self.world.main:
                self.depends[resume.TEACHERS_FILES] = self.digest.result()
                resume.same_contents(self.at, self.depends)
            self.out.add(*self.out.owned(args.cache))  # the text will be worth keeping

        with self.times("tokenising"), files.disk_sentences(args.cache):
            self.corpus = self.world.main_first(
                data.load_corpus, args.data, tokenizer, args.cache, without=args.out, check=check,
                field=args.text_field,
            )  # fmt: skip
        for note in self.corpus.notes:
            print(note)
        print(describe_text(self.corpus, stages))
        self.lookups = Lookups(tokenizer, self.corpus.train) if args.lookups else None
        return self.corpus

    def begin(self, weights: dict[str, nn.Parameter], held_out) -> None:
        """weights: what learns, set to a resumed run's; held_out: evals/held_out.py's HeldOut."""
        self.weights, self.held_out = weights, held_out
        if self.at.state:
            states.load(self.at.state, weights, None, 0)
        out, overlap = self.out, self.plan.overlap
        make_room = self.head_start.give_up
        self.saver = Saver(out, self.world, self.depends, self.at, overlap, make_room)
        self.stop_request, self.saved = resume.StopRequest(), time.monotonic()
        self.about = {
            "arguments": self.depends,
            "versions": versions(self.plan.device) | {"processes": self.world.size},
        }
        self.about |= {"text": self.corpus.name, "command": sys.argv}
        if self.world.main:
            self.watch = watch.Watch(self.out, self.plan, self.world.size, self.about, self.at)

    def measure(self, name: str, model: Llama) -> None:
        """A column of the table, filled by the first process; by all, where they share the model or
        its blocks.
        """
        if not self.held_out.n_blocks or name in self.at.columns:
            return
        with self.times("measuring"):
            P, f = max(fit.P for fit in self.plan.fits), self.held_out.measure
            together = self.args.shard or P > 1
            self.at.columns[name] = f(model, P) if together else self.world.on_main(f, model)

    # ---- the loop

    def stages(self) -> Iterator[Stage]:
        """The stages that are left."""
        for number in range(self.at.stage, len(self.plan.stages)):
            self.at.stage = number
            if number == len(self.plan.stages) - 1 and self.world.main:
                self.head_start.begin(self.args.teacher, self.plan.longer)
            yield self.plan.stages[number]
        if self.saver.job is None:
            self.saver.release()  # an export may need it

    @contextlib.contextmanager
    def training(self, stage: Stage, optimiser: torch.optim.Optimizer, step):
        """Around a stage's steps. Raises OutOfMemory, with the flags that help."""
        self.optimiser, self.step, self.stage_began = optimiser, step, []
        if self.at.step:
            states.load(self.at.state, self.weights, optimiser, self.at.step)
        self.saver.reserve(self.weights)
        print(f"{stage.name}: {step.why}")
        if self.world.main:
            self.watch.begin(self.at.stage, self.at.step)
        try:
            if self.compiling:
                self.compiling.result()
            with self.times("steps"):
                yield
        except (MemoryError, RuntimeError) as e:
            if exits.ran_out(e):
                raise plan.out_of_memory(stage, self.plan.device, self.promise()) from None
            raise
        step.close()
        self.times.first_step(self.stage_began)

    def steps(self, stage: Stage) -> Iterator[int]:
        """The numbers of the steps that are left."""
        for n in range(self.at.step, stage.steps):
            self.began = time.monotonic()
            self.figures = watch.Figures(self.plan.native.n_layer, self.plan.device)
            yield n

    def micro_batches(
        self, stage: Stage, n: int
    ) -> Iterator[tuple[Stage, Tensor, Tensor | None, float, bool]]:
        """This process's blocks of step n, a function of seed and step alone, a few at a time.

        Processes that share a block (engine/sequence.py) get all of it.

        Yields (stage or its auxiliary, ids [n, T + 1], where they stand for the student [T] if not
        at 0 .. T-1, their share of this process's blocks of that kind, whether they are the step's
        last).
        """
        args, world = self.args, self.world
        for part in (stage, stage.auxiliary):
            if part is None:
                continue
            shared = processes_per_block(part.batch, world.size)
            per_rank = part.batch * shared // world.size
            first = n * part.batch + world.rank // shared * per_rank
            seed = data.seed_of(args.seed, self.at.stage, part is stage.auxiliary)
            ids = self.corpus.batch(seed, first, per_rank, part.T)  # [per_rank, T + 1]
            ids = self.lookups.mix(ids, seed, first, args.lookups) if self.lookups else ids
            ids = ids.to(self.plan.device)
            at = positions(seed, n, part.T, self.plan.longer.rope.length, part.skips)
            at = None if at is None else at.to(self.plan.device)
            asked = args.micro if part is stage.auxiliary else self.plan.fit(stage).micro
            micro = cost.at_a_time(part, 1 if args.lora_dropout else asked, per_rank)
            for begin in range(0, per_rank, micro):
                resume.reseed(args.seed, self.at.total, first + begin)  # dropout's noise
                self.ids = ids[begin : begin + micro]
                last = part is (stage.auxiliary or stage) and begin + micro >= per_rank
                yield part, self.ids, at, len(self.ids) / per_rank, last

    def agree(self, n: int, norm: Tensor) -> None:
        """Means over all processes; whether to stop or save. norm: [], of the whole gradient.

        Raises ValueError, on all, for a loss or gradient that is not finite.
        """
        due = self.world.main and time.monotonic() - self.saved > 60 * self.args.save_minutes
        asked = bool(self.stop_request), due, self.saver.writing()
        self.stopping, self.saving, writing = self.figures.agree(self.world, *asked)
        if not writing:  # on any process
            self.saved_all()
        try:
            watch.refuse_non_finite(
                self.world,
                self.plan.stages[self.at.stage],
                n,
                self.figures,
                float(norm),
                self.weights,
                self.step.student,
                self.ids,
                self.at,
            )
        except ValueError:
            self.saver.finish()  # of a step whose numbers were good
            raise

    def log(self, n: int, norm: Tensor, lr: float) -> None:
        """The step is done: its line in the log. norm: [], before clipping."""
        self.at.step, self.at.total = n + 1, self.at.total + 1
        seconds = time.monotonic() - self.began
        self.stage_began.append(seconds)
        if self.world.main:
            self.watch.step(
                self.at.total - 1, n, self.figures, float(norm), lr, seconds, self.plan.device
            )

    def save_if_due(self) -> None:
        """Begins to write a state, where all agreed that it is time; without overlap, writes it."""
        if self.saving and not self.stopping and self._finish_unless_stopped():
            self.save(self.optimiser)
            self.saved = time.monotonic()
            self._draw(patience=60)
            if not self.plan.overlap:
                self._finish_unless_stopped()

    def _finish_unless_stopped(self) -> bool:
        """Waits for the state at work; False where a stop is asked for before it is whole."""
        with self.times("saving"):
            while not self.saver.finish(_QUIET):  # a slow disk
                if not self.world.min(float(not self.stop_request)):
                    self.stopping = True
                    return False
        return True

    def save(self, optimiser: torch.optim.Optimizer | None) -> None:
        """Begins to write a state, once the one before is whole. optimiser: whose moments are kept
        too.
        """
        with self.times("saving"):
            self.saver.finish()
            states.refuse_non_finite(self.weights, self.world)
            self.saver.start(states.slices(self.weights, optimiser, self.world), self.at)

    def stop(self) -> None:
        """Ends the process, as somebody asked, when the state is whole or time is up."""
        self.head_start.stop()
        whole, last = self._finish_in_time(), self.saver.last
        if whole and not (last and last.total == self.at.total):  # else it was this step's already
            self.save(self.optimiser)
            whole = self._finish_in_time()
        if whole:  # else there is no time
            self._draw(patience=60)
        self.saver.abandon()
        print(f"\n{self._stopped(whole)}", flush=True)
        self.out.close()
        self.world.exit(exits.STOPPED)

    def _finish_in_time(self) -> bool:
        """Waits for the state at work; whether it is whole."""
        left = self.world.peers.left()
        with self.times("saving"):
            if self.saver.finish(_QUIET if left is None else min(_QUIET, left)):
                return True
            newest = self.saver.next.where(self.plan.stages)
            print(f"\nwriting the state {newest}; if it is not whole: {self._before()}", flush=True)
            return self.saver.finish(self.world.peers.left())

    def _before(self) -> str:
        """What counts where the newest state does not."""
        last = self.saver.last
        n = self.at.total - (last.total if last else 0)
        steps = f"{n} step{'s are' if n > 1 else ' is'} lost"
        return f"the one {last.where(self.plan.stages)} counts, {steps}" if last else steps

    def _stopped(self, whole: bool) -> str:
        sentence = f"stopped {self.at.where(self.plan.stages)}"
        if not whole:
            sentence += f", too late to write its state: {self._before()}"
        return sentence + ("; --resume goes on" if self.saver.last else "; start again")

    def end_stage(self, stage: Stage, student: Llama) -> None:
        """Its column of the table, and a state without moments: the next stage has a new Adam.

        It is whole only with the column. Where there is one process, and memory for a copy, it is
        written while the next stage begins, or the export.
        """
        self.at.stage, self.at.step, self.measured = self.at.stage + 1, 0, False
        if self.world.main:
            self.watch.end()
        self.save(None)
        self.measure(stage.name, student)  # while the weights are written, as what follows
        self.measured = True
        self._draw()
        self.name_written()
        if not self.plan.overlap or self.world.size > 1:
            self.saved_all()

    def _draw(self, patience: float = 0.0) -> None:
        """The picture of the log, which goes with a state."""
        if self.world.main:
            with self.times("saving"):
                self.watch.draw(patience)

    def name_written(self) -> None:
        """A state that is written gets its name, so that a kill costs no step; none is waited for.

        Of one process: several could not agree on it.
        """
        if self.world.size == 1 and self.saver.written():
            self.saved_all()

    def saved_all(self) -> None:
        """The state at work, if there is one, is whole when this returns."""
        with self.times("saving"):
            self.saver.finish()

    def done(self) -> None:
        """The result is written."""
        self.stop_request.close()
        if self.world.main:
            self.watch.close()
        self.out.close()
        self.world.exit(0)
