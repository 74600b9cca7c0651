"""A static page that captions photographs in the browser, with an exported captioner.

``static/`` holds the page's own files, which need no build step; ``writer`` puts them together with
the captioner and with onnxruntime-web, which ``onnxruntime_web`` fetches from the npm registry.
"""
