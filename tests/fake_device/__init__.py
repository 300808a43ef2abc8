"""Accelerator cards that are not there: torch tensors that claim to be on a card, and a judge of how they are used.

`fake_cards(n)` makes torch see `n` cards for the length of a `with` block. Values are computed at once by torch's CPU
kernels, so results are real; what is checked is what a real card would punish:

- host access to what is on a card, except by a copy, which is counted as a wait of the host;
- tensors of different devices in one operation;
- a kernel launched on the current card's stream with another card's memory (as Triton launches do);
- two streams that touch the same bytes without an event between them (vector clocks, byte ranges);
- memory freed while another stream may still use it; page-locked memory that the host changes, or reads, before the
  asynchronous copy that uses it is known to have ended;
- timing events, whose differences are float32 milliseconds as CUDA's are;
- allocation beyond a card's memory;
- a wait that the host cannot leave, for a card that hangs (`FakeStream.hang`); a lost card raises what torch raises
  (`Cards.lose`).

The cards' type is "privateuseone": the only one for which torch takes a device guard written in Python. Not modelled:
real durations (a launch takes 2 us, a copy its bytes by `link_gbps`), another order of summation, graphs.
"""

from tests.fake_device.cards import DEVICE_TYPE, Cards, fake_cards
from tests.fake_device.fused import StreamedKernels
from tests.fake_device.streams import HostClock, ManualClock

__all__ = ["DEVICE_TYPE", "Cards", "HostClock", "ManualClock", "StreamedKernels", "fake_cards"]
