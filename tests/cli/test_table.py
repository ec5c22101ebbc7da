"""A comparison as a table."""

from undercroft.cli.table import comparison_table
from undercroft.training.compare import Row
from undercroft.units import MIB


def test_columns_line_up_and_failures_follow() -> None:
    rows = (
        Row(
            name="plain",
            failure=None,
            peak_nbytes=800 * MIB,
            fraction=1.0,
            seconds_per_step=2.5,
            cpu_seconds_per_step=4.0,
            equal=True,
        ),
        Row(name="checkpointed", failure="killed by the system"),
        Row(
            name="spilled",
            failure=None,
            peak_nbytes=160 * MIB,
            fraction=0.2,
            seconds_per_step=2.6,
            cpu_seconds_per_step=4.25,
            equal=False,
            spilled_nbytes=512 * MIB,
            stall_fraction=0.0125,
        ),
    )
    assert comparison_table(rows).splitlines() == [
        "         peak memory  of plain  per step     CPU  same bits  spilled  stalled",
        "plain        800 MiB      100%    2.50 s  4.00 s        yes",
        "spilled      160 MiB       20%    2.60 s  4.25 s         NO  512 MiB     1.2%",
        "checkpointed gave no result: killed by the system",
    ]
