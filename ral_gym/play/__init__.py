"""`ral-gym play`: a local page on which an image is drawn code by code.

Only `page` and `server` import Gradio (extra ``play``). `session` holds an episode and all that can be done to it,
`comparison` the two models side by side and a wrong code's effect, `sharing` what can be taken away, `fragments` the
pieces of HTML.
"""
