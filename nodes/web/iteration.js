// Each press of Run is one iteration: the widget `iteration` stays at -1, "go on", where the front end would draw it at
// random.

import { app } from '../../scripts/app.js'

app.registerExtension({
  name: 'dgpo.iteration',
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith('DGPO_')) return
    const widgets = node.widgets ?? []
    const at = widgets.findIndex((widget) => widget.name === 'iteration')
    const control = at < 0 ? undefined : widgets.slice(at + 1).find((w) => w.name === 'control_after_generate')
    if (control) control.value = 'fixed' // a workflow that is loaded sets its own value afterwards
  }
})
