"""How many steps batch normalization saves: the experiments of the paper, on real images.

Trains the variants of Ioffe & Szegedy (2015), sections 4.1 and 4.2, and shows how many steps each
needs to reach the best test accuracy of the baseline, the same network without normalization, at
the learning rate given and at the best rate of a sweep; and how well sigmoid networks of growing
depth train. After Ctrl-C, the same command goes on where it was stopped.

    python examples/speedup.py                          # scikit-learn's digits: nothing to download
    python examples/speedup.py --data mnist --data-dir DIR  # the paper's section 4.1
    python examples/speedup.py --network inception --data cifar10 --data-dir DIR
    python examples/speedup.py --network inception --modules 10 --data cifar10 --data-dir DIR
"""

from argparse import Namespace

from common.arguments import COUNT, Program, fill_in, number

# The batches of 60 and 32 and the rate of 0.0015 are the paper's. Budgets are for two CPU cores;
# the ten modules get 20 epochs of CIFAR-10.
MLP = {"eval_every": 50, "batch_size": 60, "learning_rate": 0.1, "seeds": 1}
INCEPTION = {"eval_every": 50, "batch_size": 32, "learning_rate": 0.0015, "seeds": 1}
DEFAULTS = {
    ("mlp", "digits"): MLP | {"steps": 8000, "eval_every": 20, "seeds": 3},
    ("mlp", "mnist"): MLP | {"steps": 10_000, "seeds": 3},
    ("mlp", "cifar10"): MLP | {"steps": 10_000},
    ("inception", "digits"): INCEPTION | {"steps": 1000, "eval_every": 10},
    ("inception", "mnist"): INCEPTION | {"steps": 2000},
    ("inception", "cifar10"): INCEPTION | {"steps": 4000, "eval_every": 100},
    ("inception of ten", "cifar10"): INCEPTION | {"steps": 31_250, "eval_every": 625},
}
# Wide enough for the best to lie inside.
DEPTHS = {"mlp": [2, 3, 4, 6, 12], "inception": []}
SWEEP = {"mlp": (1 / 3, 1, 3, 10, 30, 100), "inception": (1, 3, 10, 30, 100)}


def check(program: Program, options: Namespace) -> None:
    """Exits for an option of the other network; fills in what suits the network and the data."""
    inception = options.network == "inception"
    for flag in ("depth", "depths") if inception else ("modules",):
        if getattr(options, flag):
            program.error(f"--{flag} is for --network {'mlp' if inception else 'inception'}")
    fill_in(options, {"modules": 3} if inception else {"depth": 3})
    network = "inception of ten" if options.modules == 10 else options.network
    defaults = DEFAULTS.get((network, options.data)) or DEFAULTS[options.network, options.data]
    if options.steps is not None:  # as many evaluations as there would have been
        every = options.steps * defaults["eval_every"] // defaults["steps"]
        defaults = defaults | {"eval_every": max(1, every)}
    depths = DEPTHS[options.network]
    fill_in(options, defaults | {"depths": depths, "sweep": [SWEEP[options.network]]})
    options.depths = sorted(set(options.depths))
    # 1 is always there: the baseline as it is; each factor is trained once.
    options.sweep = sorted({1.0, *sum(options.sweep, start=())})


def factors(text: str) -> tuple[float, ...]:
    """Reads factors such as "1/3,1,3"."""
    convert = number(float, "positive factors such as 1/3,1,3,10")
    fractions = (part.partition("/") for part in text.split(","))
    return tuple(convert(above) / convert(below or "1") for above, _, below in fractions)


program = Program("speedup.study:Speedup", __doc__, check)
program.add("--network", None, "what to train", choices=("mlp", "inception"), default="mlp")
program.add("--depth", COUNT, "hidden layers of the mlp (default: 3)")
modules = "of the inception (default: 3); 10 are those of the paper's figure 5"
program.add("--modules", int, modules, choices=(3, 10))
program.add_runs({data: DEFAULTS["mlp", data] for data in ("digits", "mnist", "cifar10")})
sweep = "of the baseline's rate, for the stricter table; 1 to go without"
sweep += " (default: 1,3,10,30,100, for the mlp also 1/3)"
program.add("--sweep", factors, sweep, nargs="+", metavar="FACTORS")
depths = "hidden layers of the mlps of growing depth, each trained for an eighth of the steps"
depths += " (default: 2 3 4 6 12); without a number, none are"
program.add("--depths", COUNT, depths, nargs="*")
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
