"""A run, or several beside each other, as one HTML file that needs no network, or as a picture."""

from matilda_train.report.loss_picture import draw_loss
from matilda_train.report.page import write_report

__all__ = ["draw_loss", "write_report"]
