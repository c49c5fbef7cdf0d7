"""Time on the line goes with its sound, and not before it."""

from conversation.line_clock import DELAY_SECONDS, LOOK_SECONDS, MISSING_SECONDS, LineClock


class Line:
    """A clock and the sound of a line, to be moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0
        self.sound = 7.0
        self.clock = LineClock(lambda: self.sound, clock=lambda: self.time)
        self.begun = self.clock.now()

    def lasts(self, seconds: float, *, sounds: bool = True) -> None:
        """Let time pass, and look at the clock as often as somebody who waits."""
        for _ in range(round(seconds / (LOOK_SECONDS / 2))):
            self.time += LOOK_SECONDS / 2
            self.sound += LOOK_SECONDS / 2 if sounds else 0.0
            self.clock.now()

    @property
    def seconds(self) -> float:
        return round(self.clock.now().since(self.begun), 3)


def test_where_sound_comes_in_time_it_is_time_that_counts() -> None:
    line = Line()
    line.lasts(3.0)
    assert line.seconds == 3.0
    line.time += DELAY_SECONDS / 2
    assert line.seconds == 3.0 + DELAY_SECONDS / 2
    assert not line.clock.now().is_held(line.begun)


def test_a_process_that_stands_still_does_not_make_a_pause_longer_however_long() -> None:
    line = Line()
    line.lasts(0.5)
    line.time += 60.0
    assert line.seconds == 0.5 + DELAY_SECONDS
    assert line.clock.now().is_held(line.begun)
    # What was said meanwhile is listened to now.
    line.sound += 60.0
    assert line.seconds == 60.5


def test_a_hole_in_the_sound_is_waited_for_until_nothing_more_can_come_of_it() -> None:
    line = Line()
    line.lasts(0.5)
    line.lasts(MISSING_SECONDS - LOOK_SECONDS, sounds=False)
    assert line.seconds == 0.5 + DELAY_SECONDS
    line.lasts(2.0, sounds=False)
    assert line.seconds == round(2.5 + MISSING_SECONDS - LOOK_SECONDS, 3)


def test_sound_that_comes_all_at_once_does_not_hurry_the_clock() -> None:
    line = Line()
    line.sound += 5.0
    line.time += 0.01
    assert line.seconds == 0.01


def test_a_line_that_sends_no_silence_is_not_waited_for() -> None:
    """Opus does so on some lines: a piece every 0.4 s."""
    line = Line()
    for _ in range(6):
        line.lasts(0.35, sounds=False)
        line.lasts(0.05)
    assert line.seconds == 2.4
    # It waits again for what is missing once they speak, and somebody has looked seldom.
    line.time += 5.0
    line.sound += 5.0
    line.clock.now()
    line.begun = line.clock.now()
    line.lasts(0.5, sounds=False)
    assert line.seconds == DELAY_SECONDS
