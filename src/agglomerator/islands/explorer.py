"""What a column agrees with, on a figure that answers mouse and keys: the view of `--mode=explore`.

It works on every canvas of matplotlib: that of a window, of a page in the browser, or of none.
"""

import math

from matplotlib.widgets import Slider

from agglomerator.islands.agreement import AgreementPanels
from agglomerator.util.errors import UserError

KEYS = "click: column    left right: image    up down: iteration    + -: islands    s: save"
MOVES = {  # key -> slider and direction
    "left": ("image", -1),
    "right": ("image", 1),
    "down": ("iteration", -1),
    "up": ("iteration", 1),
    "-": ("islands", -1),
    "+": ("islands", 1),
    "=": ("islands", 1),  # + without the shift key
}
THRESHOLD_STEP, POWER_STEP = 0.01, 0.05  # of the keys; the slider of a loss has its power of ten
LEAST_POWER = -5.0
LEAST_WIDTH = 7.0  # inches
STRIP, LINE = 1.2, 0.26  # inches below the panels for sliders and text, and for one of these
TITLE = 0.3  # inches above the panels


class Explorer:
    """Shows what one column of an image agrees with, and lets the user choose image, column,
    iteration, and the threshold (or loss) of the islands.

    Args:
        figure: an empty matplotlib figure with a constrained layout, on its canvas. It answers as
            long as the explorer lives.
        gallery: a sequence of `Islands` of one image each, all of one network. Where it raises a
            `UserError`, the message is shown, and the image before stays.
        save: a function that writes a still, given `Islands` and the `column` and `t` of
            `Islands.draw_agreement`, and returns a text to show.
        close: a function that closes the figure; None if it does not close by a key.

    Attributes:
        islands: of the image shown.
        column: (row, column), the one pointed at.
        sliders: by name, "image", "iteration" and "islands"; those that have a choice.
    """

    def __init__(self, figure, gallery, save, close):
        self.figure, self.gallery, self.save, self.close = figure, gallery, save, close
        self.keys = KEYS + ("    q: close" if close else "")
        first, fault = _first_readable(gallery)
        self.islands = gallery[first]
        self.column = (self.islands.side // 2,) * 2
        self.panels = AgreementPanels(self.islands.states.shape[3], " ", "", figure)
        width, height = figure.get_size_inches()
        self.height = height + STRIP
        figure.set_size_inches(max(width, LEAST_WIDTH), self.height)
        self.text = figure.text(0.5, 0.3 * LINE / self.height, self.keys, ha="center", fontsize=8)
        low = STRIP / self.height
        self.title = figure.suptitle(" ", fontsize=11)
        for text in (self.title, self.text):
            text.set_in_layout(False)
        figure.get_layout_engine().set(rect=(0, low, 1, 1 - low - TITLE / self.height))
        self.sliders = self._sliders(first)
        self._show()
        if fault is not None:
            self._tell(fault)
        figure.draw_without_rendering()  # finds the layout, once: it is slow
        figure.set_layout_engine("none")
        for event, answer in (
            ("button_press_event", self._point),
            ("motion_notify_event", self._point),
            ("key_press_event", self._press),
        ):
            figure.canvas.mpl_connect(event, answer)

    @property
    def t(self):
        """Number of the state that is shown."""
        return int(self.sliders["iteration"].val) if "iteration" in self.sliders else 0

    def _sliders(self, first):
        islands, last, made = self.islands, len(self.gallery) - 1, {}
        if last:
            made["image"] = self._slider(3, "image", 0, last, first, step=1)
            made["image"].on_changed(self._choose)
        if islands.iters:
            ends = 0, islands.iters
            made["iteration"] = self._slider(2, "iteration", *ends, islands.iters, step=1)
            made["iteration"].on_changed(self._show)
        if islands.loss is None:
            ends = min(0, islands.threshold), 1
            slider = self._slider(1, "threshold", *ends, islands.threshold, "{:.3g}".format)
        else:
            power = math.log10(islands.loss)
            ends = min(LEAST_POWER, power), max(0, power)
            slider = self._slider(1, "loss", *ends, power, lambda power: f"{10**power:.2g}")
        slider.on_changed(self._show)
        return made | {"islands": slider}

    def _slider(self, line, text, low, high, value, form="{:.0f}".format, step=None):
        place = 0.2, line * LINE / self.height, 0.65, LINE / self.height
        ax = self.figure.add_axes(place)
        ax.set_in_layout(False)
        slider = Slider(
            ax, text, low, high, valinit=value, valfmt=form, valstep=step, initcolor="none"
        )
        for label in (slider.label, slider.valtext):
            label.set_fontsize(9)
        return slider

    def _choose(self, number):
        try:
            self.islands = self.gallery[int(number)]
        except UserError as error:
            self._tell(str(error))
        else:
            self._show()

    def _point(self, event):
        """Choose the column below the mouse, if its button is down."""
        if event.button != 1 or event.inaxes not in self.panels.axes.flat:
            return
        side = self.islands.side
        place = tuple(min(max(round(z), 0), side - 1) for z in (event.ydata, event.xdata))
        if event.inaxes.images and place != self.column:
            self.column = place
            self._show()

    def _press(self, event):
        if event.key == "s":
            self._tell(self.save(self.islands, self.column, self.t))
        elif event.key == "q" and self.close:
            self.close()
        elif event.key in MOVES:
            name, step = MOVES[event.key]
            slider = self.sliders.get(name)
            if slider is not None:
                if name == "islands":
                    step *= THRESHOLD_STEP if self.islands.loss is None else POWER_STEP
                slider.set_val(min(max(slider.val + step, slider.valmin), slider.valmax))

    def _show(self, _=None):
        islands, value = self.islands, float(self.sliders["islands"].val)
        if islands.loss is None:
            islands.threshold = value
        else:
            islands.loss = 10**value
        self.panels.show(*islands.around(0, self.column, self.t))
        row, place = self.column
        when = f"iteration {self.t} of {islands.iters}"
        self.title.set_text(f"{islands.names[0]}: {when}, column {row}, {place}")
        self._tell(self.keys)

    def _tell(self, text):
        self.text.set_text(text)
        self.figure.canvas.draw_idle()


def _first_readable(gallery):
    """The number of the first image of a gallery that can be read, and why it is not the very
    first; None if it is.

    Raises:
        UserError: there is none.
    """
    fault = None
    for number in range(len(gallery)):
        try:
            gallery[number]
        except UserError as error:
            fault = fault or error
        else:
            return number, None if fault is None else str(fault)
    raise fault
