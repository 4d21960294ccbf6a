"""Compile what a measurement will run, on all cores: ``python -m bdlora_perf.kernels.compile_ahead --capability 90``.

Triton keeps the result on disk by kernel, constants and architecture, so that measuring does not wait for the compiler.
"""

import argparse
from itertools import islice

from bdlora_perf.kernels.shapes import all_cases
from bdlora_perf.kernels.static import SYSTEM_NAMES, read_all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, required=True, help="90 for sm_90")
    parser.add_argument("--cases", type=int, default=48, help="so many of the first cases")
    arguments = parser.parse_args()
    cases = list(islice(all_cases(), arguments.cases))
    done = 0
    for number, _ in read_all(cases, arguments.capability, SYSTEM_NAMES):
        done += number
        print(f"{done} of {len(cases)} cases are compiled", flush=True)


if __name__ == "__main__":
    main()
