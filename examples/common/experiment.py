"""Runs the variants and then the baseline's sweep, and reports after each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import Progress

from common import data, depths, networks, report, training
from common.depths import Depth
from common.interrupt import Interrupt, Interrupted
from common.options import Options, Variant
from common.session import environment, guard, progress_bar, settings
from common.tables import PAPER, Result, Table, best_of_sweep, compare

CAPTION = (
    "What to see: where each curve crosses the dashed line, the baseline's best accuracy. For"
    " networks of growing depth: plain sigmoids stop training as layers are added, normalized ones"
    " do not."
)


def run(options: Options, variants: Sequence[Variant], interrupt: Interrupt) -> int:
    """Trains the variants, the first as the baseline, and reports; returns the exit status."""
    console = Console()

    def work() -> bool:
        experiment = Experiment(options, variants, interrupt)
        finished = experiment.train(console)
        experiment.show(console, finished)
        return finished

    return guard("speedup.py", options.out, work)


class Experiment:
    """The variants and the sweep of one command line, and what is finished of them.

    Args:
      options: the command line.
      variants: the baseline first.
      interrupt: asked after each evaluation.
    """

    def __init__(self, options: Options, variants: Sequence[Variant], interrupt: Interrupt):
        self.options, self.variants, self.interrupt = options, variants, interrupt
        self.results: list[Result] = []
        self.swept: list[Result] = []
        self.depths: list[Depth] = []
        self.trainers: dict[tuple[networks.Style, int | None], training.Trainer] = {}
        dataset = data.selected(options)
        self.train_count, self.test_count = len(dataset.train_labels), len(dataset.test_labels)
        if options.batch_size > self.train_count:
            raise data.DataError(
                f"--batch-size {options.batch_size}: {options.data} has {self.train_count} examples"
            )
        # The paper's MLP takes pixels in [0, 1]. For images in colour, standardized ones are what a
        # baseline deserves.
        self.examples = training.examples(dataset, standardize=options.network == "inception")
        options.out.mkdir(parents=True, exist_ok=True)
        self.save("running")

    @property
    def sweep_factors(self) -> list[float]:
        """The factors that are not trained as a variant anyway."""
        return [factor for factor in self.options.sweep if factor != 1]

    @property
    def depth_steps(self) -> int:
        """The budget of each network of the growing ones."""
        return max(1, self.options.steps // depths.SHARE)

    def train(self, console: Console) -> bool:
        """Trains all there is to train and returns whether it got to the end."""
        with progress_bar(console) as progress:
            try:
                for variant in self.variants:
                    self.results.append(self._train(variant, variant.factor, progress))
                    self.save("running")
                for factor in self.sweep_factors:
                    self.swept.append(self._train(self.variants[0], factor, progress))
                    self.save("running")
                for layers in self.options.depths:
                    self.depths.append(self._train_depth(layers, progress))
                    self.save("running")
            except (Interrupted, KeyboardInterrupt):
                self.save("interrupted")
                return False
        self.save("finished")
        return True

    def _train_depth(self, layers: int, progress: Progress) -> Depth:
        def results(normalize: bool) -> list[Result]:
            variant = Variant(f"{layers} layers{', BN' * normalize}", normalize, 1, "sigmoid")
            return [
                self._train(variant, factor, progress, depth=layers, steps=self.depth_steps)
                for factor in depths.FACTORS
            ]

        return Depth(layers, results(False), results(True))

    def _train(
        self,
        variant: Variant,
        factor: float,
        progress: Progress,
        *,
        depth: int | None = None,
        steps: int | None = None,
    ) -> Result:
        options, rate = self.options, self.options.learning_rate * factor
        steps, depth = steps or options.steps, depth or options.depth
        label = f"{variant.name:<16} rate {rate:<7.3g}"
        task = progress.add_task(label, total=options.seeds * steps, accuracy="compiling")
        trainer = self._trainer(networks.Style(variant.normalize, variant.activation), depth)

        def evaluated(steps: int, accuracy: float) -> None:
            progress.update(task, advance=steps, accuracy=f"{accuracy:.1%}")
            self.interrupt.check()

        runs = [
            trainer.run(seed, rate, steps, options.eval_every, evaluated)
            for seed in range(options.seeds)
        ]
        return Result(variant.name, rate, runs)

    def _trainer(self, style: networks.Style, depth: int | None) -> training.Trainer:
        """Returns the trainer of a style and depth, compiled once for all rates and seeds."""
        if (style, depth) not in self.trainers:
            network = networks.inception(style) if depth is None else networks.mlp(style, depth)
            self.trainers[style, depth] = training.Trainer(
                network, self.examples, self.options.batch_size, self.options.momentum
            )
        return self.trainers[style, depth]

    @property
    def best_baseline(self) -> Result | None:
        """The baseline at the best rate of its sweep, None unless the sweep is finished."""
        if not self.sweep_factors or len(self.swept) < len(self.sweep_factors):
            return None
        return best_of_sweep([self.results[0], *self.swept])

    def tables(self) -> list[Table]:
        """Returns the tables that can be made from what is finished."""
        if not self.results:
            return []
        baseline, *others = self.results
        title = "As in the paper: relative to the baseline's learning rate"
        tables = [compare(title, baseline, others, data.CLASSES, PAPER)]
        if best := self.best_baseline:
            title = "Stricter than the paper: relative to the baseline at its best learning rate"
            tables.append(
                compare(title, best._replace(name="Baseline, best"), others, data.CLASSES)
            )
        return tables

    def save(self, status: str) -> None:
        """Writes all there is so far as JSON."""
        config = settings(asdict(self.options))
        config |= {"train_examples": self.train_count, "test_examples": self.test_count}
        config |= {
            "momentum": self.options.momentum,
            "batch_norm_momentum": networks.BATCH_NORM_MOMENTUM,
        }
        content = {
            "status": status,
            "config": config,
            **environment(),
            "variants": [report.result_content(result) for result in self.results],
            "sweep": [report.result_content(result) for result in self.swept],
            "tables": [report.table_content(table) for table in self.tables()],
            "depths": depths.content(self.depths),
        }
        report.write_json(self.options.out / "speedup.json", content)

    def show(self, console: Console, finished: bool) -> None:
        """Prints the tables and writes the plot."""
        for table in self.tables():
            console.print(report.rich_table(table))
        if best := self.best_baseline:
            self._remark(console, best)
        if self.depths:
            console.print(depths.table(self.depths, self.depth_steps))
        if not finished:
            console.print(
                f"Interrupted: {len(self.results)} of {len(self.variants)} variants are finished"
                f", {len(self.swept)} of {len(self.sweep_factors)} other rates of the baseline's "
                "sweep"
                f" and {len(self.depths)} of {len(self.options.depths)} depths."
            )
        if self.results:
            path = self.options.out / "speedup.png"
            curves = [*self.results]
            if (best := self.best_baseline) and best is not self.results[0]:
                curves.insert(1, best._replace(name="Baseline, best"))
            panels = 2 if self.depths else 1
            title = f"{self.options.network} on {self.options.data}"
            with report.figure(path, title, CAPTION, (1, panels), (2 + 5 * panels, 5.5)) as (
                (axes, *further),
            ):
                report.draw_curves(axes, curves)
                if self.depths:
                    depths.draw(further[0], self.depths, self.depth_steps)
            console.print(f"Plot: {path.resolve()}", soft_wrap=True)
        console.print(f"Results: {(self.options.out / 'speedup.json').resolve()}", soft_wrap=True)

    def _remark(self, console: Console, best: Result) -> None:
        rates = sorted(result.learning_rate for result in (self.results[0], *self.swept))
        console.print(
            "Sweep: "
            + ", ".join(f"{rate:.3g}" for rate in rates)
            + f"; best {best.learning_rate:.3g}"
        )
        if best.learning_rate in (rates[0], rates[-1]):
            console.print(
                "The best is at the end of the sweep: --sweep should go further for a strict "
                "comparison."
            )
