"""Several batch_stats for one params: domains that share a network, but not their statistics.

Trains one small network on digits from two domains, as they are and with --shift (faint, inverted
or noisy), and shows the test accuracy in each, with batch normalization's statistics handled in
four ways (studies/domains/ways.py).

    python examples/domains.py                          # scikit-learn's digits: nothing to download
    python examples/domains.py --data mnist --data-dir DIR
"""

from common.arguments import SHIFTS, Program

RUN = {"seeds": 5, "steps": 600, "eval_every": 20, "batch_size": 32, "learning_rate": 0.1}

program = Program("domains.study:Domains", __doc__)
program.add("--shift", None, "what the second domain is", choices=SHIFTS, default="faint")
program.add_runs({"digits": RUN, "mnist": RUN})
parse, main = program.parse, program.main

if __name__ == "__main__":
    raise SystemExit(main())
