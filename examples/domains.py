"""Several batch_stats for one params: domains that share a network, but not their statistics.

Trains one small network on digits from two domains, as they are and with --shift (faint, inverted
or noisy), and shows the test accuracy in each, with batch normalization's statistics handled in
four ways:

    mixed        one batch_stats; every batch holds both domains
    in turn      one batch_stats; batches of one domain, then of the other
    own          a batch_stats for each domain; batches as before
    conditional  one batch_stats, mixed batches; each example gets its domain's scale and bias

    python examples/domains.py                          # scikit-learn's digits: nothing to download
    python examples/domains.py --data mnist --data-dir DIR

The network is a pure function `apply(params, batch_stats, x, train)` that returns its new
statistics, so a second set of them is a second variable (studies/domains/ways.py). The same lines
work for

adversarial examples (Xie et al. 2020, AdvProp; see adversarial_pairs.py), whose statistics differ
from clean images':

    clean, stats["clean"] = apply(params, stats["clean"], x, True)
    attacked, stats["attacked"] = apply(params, stats["attacked"], attack(params, x), True)

a teacher that is a moving average of the student (Tarvainen & Valpola 2017), with statistics of its
own, which its own forward passes update, or with the student's:

    logits, stats["student"] = apply(params["student"], stats["student"], x, True)
    targets, stats["teacher"] = apply(params["teacher"], stats["teacher"], x, True)

and GANs, whose discriminator gets real and generated images in turn:

    real, stats["real"] = apply(params, stats["real"], images, True)
    fake, stats["fake"] = apply(params, stats["fake"], generated, True)

A pass that should not change statistics, such as the attack's, drops them: `logits, _ =
apply(...)`.
"""

import sys

from common.arguments import SHIFTS, Program

RUN = {"seeds": 5, "steps": 600, "eval_every": 20, "batch_size": 32, "learning_rate": 0.1}

program = Program("domains.study:Domains", __doc__)
program.add("--shift", None, "what the second domain is", choices=SHIFTS, default="faint")
program.add_runs({"digits": RUN, "mnist": RUN})
parse, main = program.parse, program.main

if __name__ == "__main__":
    sys.exit(main())
