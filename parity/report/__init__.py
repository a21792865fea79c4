"""What people and other programs read of a run: tables on the terminal, one HTML page, JUnit XML."""

from parity.report.command import main as main
from parity.report.grid import margin as margin
from parity.report.grid import worst_margins as worst_margins
from parity.report.junit import check_junit as check_junit
from parity.report.junit import write_junit as write_junit
from parity.report.terminal import capabilities as capabilities
from parity.report.terminal import capability_table as capability_table
from parity.report.terminal import duration as duration
from parity.report.terminal import explain as explain
from parity.report.terminal import final_table as final_table
from parity.report.terminal import flag_lines as flag_lines
from parity.report.terminal import notes as notes
from parity.report.terminal import progress_line as progress_line
