"""The life of a block in a slot of a tier, as a table: what is not in it is refused. Pure.

                      +------ restore ------+            pin
                      |                     v          ------>
    ABSENT --reserve--> FILLING --commit--> READY              LEASED (one state, any number of pins)
      ^                 |     |             |   ^      <------   |
      +------ abort ----+     |             |   +-- last unpin --+
      |                    discard     evict, discard        discard
      |                       v             |                    v
      |                  QUARANTINED        |                QUARANTINED
      |                       |  commit     v                    |  last unpin
      +---- abort ------------+-------> EVICTING <---------------+
      |                                     |
      +-------------- erased ---------------+

Only a READY or LEASED block is served. QUARANTINED: its content must not be served any more, damaged or reset, but
somebody still reads or fills the slot. EVICTING: it has left the index, but its bytes take up the place until whoever
keeps them has erased them. That is so for objects in a store (`erases`); a slot of memory or disk is erased by being
written again, so there EVICTING lasts no time: the slot is ABSENT at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum


class BlockState(IntEnum):
    ABSENT = 0
    FILLING = 1
    READY = 2
    LEASED = 3
    EVICTING = 4
    QUARANTINED = 5


ABSENT, FILLING, READY, LEASED, EVICTING, QUARANTINED = map(int, BlockState)

#: Event -> state before -> state after. What is not here is refused. `unpin` is the last one; EVICTING stands for
#: ABSENT in tiers where overwriting erases.
TRANSITIONS: Mapping[str, Mapping[int, int]] = {
    "reserve": {ABSENT: FILLING},
    "restore": {ABSENT: READY},
    "commit": {FILLING: READY, QUARANTINED: EVICTING},
    "abort": {FILLING: ABSENT, QUARANTINED: ABSENT},
    "pin": {READY: LEASED, LEASED: LEASED},
    "unpin": {LEASED: READY, QUARANTINED: EVICTING},
    "discard": {FILLING: QUARANTINED, READY: EVICTING, LEASED: QUARANTINED},
    "evict": {READY: EVICTING},
    "erased": {EVICTING: ABSENT},
}
